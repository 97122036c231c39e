"""How a diffusion pipeline is loaded and driven: sampling, conditions, schedulers."""

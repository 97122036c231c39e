"""How a diffusion pipeline is driven: sampling, conditions, schedulers."""

"""From result files to terminal, README and site."""

"""Parts of other methods that the paper compares with: PTQ-D's correction, low-rank updates."""

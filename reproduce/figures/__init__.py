"""Plots and pictures, in one style."""

"""Metrics, their features and references, and folders of samples."""

"""The embedded models: architectures, training data, training, export."""

"""The embedded models: their architectures, data, training, export and cards."""

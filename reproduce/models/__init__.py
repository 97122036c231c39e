"""The paper's models and their embedded stand-ins."""

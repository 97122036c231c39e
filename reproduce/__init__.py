"""The driver: runs the paper's tables at one of three scales, keeps every stage's product, and reports the results."""

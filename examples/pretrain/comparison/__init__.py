"""Comparisons of optimizers: what is trained, at which learning rates, and the report of it."""

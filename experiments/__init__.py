"""Comparisons of optimizers: plans, sweeps over them, and what the theory predicts."""

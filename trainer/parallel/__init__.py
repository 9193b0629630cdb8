"""Ranks, those that take part in a step, and the distribution of a model over them."""

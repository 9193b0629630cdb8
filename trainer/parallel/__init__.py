"""Ranks, who of them takes part in a step, and how a model is spread over them."""

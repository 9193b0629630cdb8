"""Watching a run beside its training."""

"""What watches a run beside its training."""

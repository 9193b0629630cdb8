"""A ladder's statistics: fits, multipliers, verdicts."""

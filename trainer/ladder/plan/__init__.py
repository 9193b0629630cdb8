"""A ladder as planned: file, sizes, arms, runs."""

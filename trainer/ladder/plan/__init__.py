"""The plan of a ladder: its file, sizes, arms and runs."""

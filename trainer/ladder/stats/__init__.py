"""Statistics of a ladder: loss against compute, the multiplier of each arm, the verdict. Works on numbers alone."""

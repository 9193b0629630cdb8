"""Many runs: their store, their order, the start of their processes, and their supervision."""

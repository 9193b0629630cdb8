"""Many runs: where they are stored, which is next, where their processes start, who supervises them."""

"""Many runs on one machine: where they lie, which is next, who watches them."""

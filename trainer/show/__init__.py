"""What people see: terminal, pictures, pages, W&B."""

"""The display for people: terminal, pictures, pages, W&B."""

"""Islands: virtual clusters that train apart for some steps, then exchange what they have learnt (README.md here)."""

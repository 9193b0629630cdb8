"""Who computes, and how a model is spread over ranks."""

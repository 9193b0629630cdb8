"""Training under failures at scales that nobody here owns: scenarios, their simulation, and the picture over sizes."""

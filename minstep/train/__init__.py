"""Training in the same NumPy: the forward functions that exist are differentiated, not copied."""

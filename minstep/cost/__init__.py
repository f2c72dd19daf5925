"""What a token costs: parameters, FLOPs, bytes, time on known hardware, and money."""

"""Files: configurations, checkpoints, their tensors and layouts."""

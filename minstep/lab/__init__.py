"""Looks at the model from outside; the model never imports it."""

"""Faster forms and stored weights: nobody needs to read them to understand the model."""

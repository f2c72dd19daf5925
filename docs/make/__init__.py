"""What draws the figures of the book and fills its pages; not installed."""

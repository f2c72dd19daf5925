"""Drawing: SVG as text, the same bytes each time, and the charts made of it."""

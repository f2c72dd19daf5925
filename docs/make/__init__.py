"""What draws the figures of the book and fills its pages; not installed."""

import minstep as minstep  # before NumPy, for it says how many threads NumPy's library has

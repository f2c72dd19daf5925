"""Holding this model against another implementation: recordings, comparisons, known bugs."""

"""Measuring the norms of weights, and recordings of them."""

"""Measuring and normalising weights, and the parameter groups that say which of them decay."""

"""Fuses the ReLU, or the addition and the ReLU, behind a norm of a model into the norm."""

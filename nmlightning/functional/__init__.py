"""Statistics and normalisation of activations as pure functions on tensors."""

"""Let a norm do the ReLU, or the addition and the ReLU, that follow it in a model's forward."""

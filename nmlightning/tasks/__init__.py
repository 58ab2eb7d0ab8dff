"""The LightningModules: what is trained, and what is logged about it."""

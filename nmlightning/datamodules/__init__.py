"""Data for the experiments: small sets held in memory, augmented on the training device."""

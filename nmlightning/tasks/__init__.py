"""The LightningModules: what is trained, and what is logged about it."""

from nmlightning.tasks.classification import ImageClassifier as ImageClassifier

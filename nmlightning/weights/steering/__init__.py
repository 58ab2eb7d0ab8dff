"""Rules that work on an optimizer's step: what a step did to a weight is scaled or projected."""

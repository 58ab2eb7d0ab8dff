"""Rules that work on an optimizer's step: what a step did to a weight is scaled or projected."""

from nmlightning.weights.steering.decay_equivalent_lr import DecayEquivalentLR as DecayEquivalentLR
from nmlightning.weights.steering.lr_correction import LRCorrection as LRCorrection
from nmlightning.weights.steering.norm_schedule import NormSchedule as NormSchedule

Steering = LRCorrection | NormSchedule | DecayEquivalentLR
"""Any of the rules."""

"""Rules that work on an optimizer's step: what a step did to a weight is scaled or projected."""

from nmlightning.weights.steering.decay_equivalent_lr import DecayEquivalentLR as DecayEquivalentLR
from nmlightning.weights.steering.following_rule import FollowingRule as FollowingRule
from nmlightning.weights.steering.hyperball import Hyperball as Hyperball
from nmlightning.weights.steering.lr_correction import LRCorrection as LRCorrection
from nmlightning.weights.steering.norm_schedule import NormSchedule as NormSchedule
from nmlightning.weights.steering.radial_projection import RadialProjection as RadialProjection
from nmlightning.weights.steering.rule import Steering as Steering

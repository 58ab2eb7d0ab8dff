"""Callbacks for any Lightning project, each the timing of a function that works without it."""

from nmlightning.callbacks.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
from nmlightning.callbacks.checkpoints import ExactResume as ExactResume
from nmlightning.callbacks.int8_swap import Int8Swap as Int8Swap
from nmlightning.callbacks.norm_swap import NormGuard as NormGuard
from nmlightning.callbacks.norm_swap import NormSwap as NormSwap
from nmlightning.callbacks.weight_norm_swap import WeightNormSwap as WeightNormSwap
from nmlightning.callbacks.weight_norm_tracker import WeightNormTracker as WeightNormTracker

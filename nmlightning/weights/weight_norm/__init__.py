"""Weights that are normalised: weight norm and bounded weight norm, in L1, L2 or L∞."""

from nmlightning.weights.weight_norm.apply import apply_weight_norm as apply_weight_norm
from nmlightning.weights.weight_norm.apply import remove_weight_norm as remove_weight_norm
from nmlightning.weights.weight_norm.weight_norm import WeightNorm as WeightNorm

"""Weight norm and bounded weight norm, in L1, L2 or L∞."""

from nmlightning.parametrizations.apply import apply_weight_norm as apply_weight_norm
from nmlightning.parametrizations.apply import remove_weight_norm as remove_weight_norm
from nmlightning.parametrizations.weight_norm import WeightNorm as WeightNorm

"""Fused kernels behind one dispatch point; each computes what the formula does, to rounding."""

from nmlightning.norms.kernels.dispatch import Case as Case
from nmlightning.norms.kernels.dispatch import Choice as Choice
from nmlightning.norms.kernels.dispatch import choose as choose
from nmlightning.norms.kernels.dispatch import norm_backend as norm_backend

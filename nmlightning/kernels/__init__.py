"""Fused kernels behind one dispatch point; each computes what the formula does, to rounding."""

from nmlightning.kernels.dispatch import Case as Case
from nmlightning.kernels.dispatch import Choice as Choice
from nmlightning.kernels.dispatch import choose as choose
from nmlightning.kernels.dispatch import norm_backend as norm_backend

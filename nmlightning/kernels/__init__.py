"""Fused kernels behind one dispatch point; each computes what the formula does, to rounding."""

from nmlightning.kernels.dispatch import norm_backend as norm_backend
from nmlightning.kernels.dispatch import select_backend as select_backend
from nmlightning.kernels.interface import Dispatch as Dispatch
from nmlightning.kernels.interface import DispatchKey as DispatchKey

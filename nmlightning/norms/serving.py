"""Who computes a layer's forward pass on an input, asked without running it."""

from torch import Tensor, nn

from nmlightning.norms.batch_norm import StatisticBatchNorm
from nmlightning.norms.kernels.dispatch import FORMULA, Choice, Kind, choose_for
from nmlightning.norms.layer_norm import LpLayerNorm
from nmlightning.norms.rms_norm import LpRMSNorm
from nmlightning.norms.settings import accumulation_dtype
from nmlightning.norms.statistics import PowerMean


def choice_for(layer: nn.Module, input: Tensor) -> Choice:
    """Return what the layer takes in training for an input like this one, and why."""
    if isinstance(layer, StatisticBatchNorm):
        dtype = accumulation_dtype(input.dtype, layer.stats_dtype)
        return choose_for(input, "batch", layer.statistic, dtype)
    if isinstance(layer, (LpLayerNorm, LpRMSNorm)):
        dtype = accumulation_dtype(input.dtype, layer.stats_dtype)
        kind: Kind = "layer" if isinstance(layer, LpLayerNorm) else "rms"
        return choose_for(input, kind, PowerMean(layer.p), dtype)
    return Choice(FORMULA, "no kernels for this norm")

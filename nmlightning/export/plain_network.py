"""A copy of a network in plain torch: no parametrizations, no norms of this package's."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from nmlightning.fusing.fusing import unfuse
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.layer_norm import LpLayerNorm
from nmlightning.norms.rms_norm import LpRMSNorm
from nmlightning.surgery import swap_norms
from nmlightning.swappable import find_norm_layers
from nmlightning.weights.weight_place import plain_modules


def copy_to_evaluate(net: nn.Module) -> nn.Module:
    """Return a copy of the network in evaluation, on the CPU, in float32, its norms not fused."""
    copied = copy.deepcopy(getattr(net, "_orig_mod", net)).cpu().float().eval()
    unfuse(copied)
    return copied


@torch.no_grad()
def remove_parametrizations(net: nn.Module) -> list[str]:
    """Make parameters of all weights that torch's parametrizations compute, with their values.

    Weights that are tied stay tied. Of classes that copies of the network share nothing changes,
    as it would by `torch.nn.utils.parametrize.remove_parametrizations`.

    Returns:
        The names of the weights.
    """
    places = [
        (path, module, name)
        for path, module in plain_modules(net)
        if parametrize.is_parametrized(module)
        for name in module.parametrizations  # type: ignore[union-attr]
    ]
    # All are computed before any is changed: tied ones are computed from one hidden weight.
    values = [getattr(module, name).clone() for _, module, name in places]
    hidden = [_hidden(module, name) for _, module, name in places]
    for _, module, _ in places:
        if parametrize.is_parametrized(module):
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
    plain: dict[int, nn.Parameter] = {}
    for (_, module, name), value, key in zip(places, values, hidden, strict=True):
        others = list(module._parameters)
        module.register_parameter(name, plain.setdefault(id(key), nn.Parameter(value)))
        for other in others:  # behind it, as a bias is behind a weight
            module._parameters[other] = module._parameters.pop(other)
    return [f"{path}.{name}".lstrip(".") for path, _, name in places]


def _hidden(module: nn.Module, name: str) -> object:
    """Return what a weight is computed from: one tensor, or all that holds several."""
    holder = module.parametrizations[name]  # type: ignore[index]
    return getattr(holder, "original", holder)


def swap_back(net: nn.Module) -> list[str]:
    """Give batch norms torch's classes, wherever evaluation is torch's.

    Returns:
        The names of the norms that need this package to evaluate: layer norms, RMS norms, and
        batch norms that keep no running statistics.
    """
    ours = {
        x.name: x.module
        for x in find_norm_layers(net)
        if isinstance(x.module, (BatchNormBase, LpLayerNorm, LpRMSNorm))
    }
    replaceable = {
        name: module
        for name, module in ours.items()
        if isinstance(module, BatchNormBase) and module.running_mean is not None
    }
    swappable = [x.name for x in find_norm_layers(net) if x.name in replaceable and not x.refusal]
    if swappable:
        swap_norms(net, "l2", include=swappable)
    return [name for name, module in ours.items() if type(module).__module__.startswith(_HERE)]


_HERE = "nmlightning."

"""Parameter groups by scope: which parameters decay, and which layer gives the output."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nmlightning.errors import InputError, is_number, nearest


def find_output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer whose weight gives a model's output, or None if none does.

    It is what `get_output_embeddings()` of the model, or of a part of it, returns, as in Hugging
    Face's models: an embedding, where the output is computed with its weight; else the last
    `nn.Linear`, but for those inside an `nn.MultiheadAttention`.
    """
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        layer = getter() if callable(getter) else None
        if isinstance(layer, nn.Module):
            return layer
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    return linears[-1] if linears else None


WeightDecayScope = Literal["all", "no_norm", "no_conv", "last_layer"]

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
THIRD_PARTY_NORM = re.compile(r"norm(act)?(\dd)?$", re.IGNORECASE)  # RmsNorm2d, LlamaRMSNorm, …
PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\..*$")  # bn.….weight.original


def parameter_groups(
    model: nn.Module, weight_decay: float | None, scope: WeightDecayScope = "all"
) -> list[dict[str, Any]]:
    """Return the groups to hand to an optimizer, so that only the parameters in `scope` decay.

    Args:
        model: holds the parameters. Every trainable one is in exactly one group, also when modules
            share it (it decays if one of its uses does); frozen ones are left out.
        weight_decay: λ ≥ 0 of the decaying group; None leaves it to the optimizer's own setting.
        scope: `all`; `no_norm`, all but the parameters of normalization layers and biases;
            `no_conv`, all but the weights of convolutions, for a rule that decays them itself; or
            `last_layer`, only that of `find_output_layer`, mostly the last `nn.Linear` (the "weight
            decay off" of the paper's study: https://arxiv.org/abs/1803.01814, figure 1).

    Returns:
        At most two dictionaries with `params`, and `weight_decay`: λ, then 0; none is empty.

    Raises:
        InputError: for another scope, a negative λ, a model in which nothing can be trained, or
            `last_layer` where the model has no `nn.Linear`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10))
        >>> [len(group["params"]) for group in parameter_groups(model, 5e-4, "no_norm")]
        [2, 4]
    """
    _check(model, weight_decay, scope)
    decaying = set(_decaying(model, scope))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed: dict[str, Any] = {"params": [p for p in trainable if p in decaying]}
    if weight_decay is not None:
        decayed["weight_decay"] = weight_decay
    exempt = {"params": [p for p in trainable if p not in decaying], "weight_decay": 0.0}
    return [group for group in (decayed, exempt) if group["params"]]


def _check(model: nn.Module, weight_decay: float | None, scope: str) -> None:
    allowed = get_args(WeightDecayScope)
    if scope not in allowed:
        raise InputError(
            f"weight-decay scope {scope!r} is not one of {', '.join(allowed)}."
            f"{nearest(str(scope), allowed)}"
        )
    if weight_decay is not None and not (is_number(weight_decay) and weight_decay >= 0):
        raise InputError(f"weight_decay is {weight_decay!r}; it must be 0 or more.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no trainable parameter to optimize.")


def _decaying(model: nn.Module, scope: WeightDecayScope) -> Iterator[nn.Parameter]:
    if scope == "all":
        yield from model.parameters()
    elif scope == "last_layer":
        layer = find_output_layer(model)
        if layer is None:
            raise InputError(
                f"weight-decay scope 'last_layer' needs an nn.Linear, and {type(model).__name__} "
                "has none: choose 'all' or 'no_norm'."
            )
        yield from layer.parameters()
    elif scope == "no_conv":
        convolved = {
            id(parameter)
            for layer, name, parameter in _uses(model)
            if isinstance(layer, _ConvNd) and name == "weight"
        }
        yield from (q for q in model.parameters() if id(q) not in convolved)
    else:
        for layer, name, parameter in _uses(model):
            is_bias = "bias" in name.split("_")  # as in in_proj_bias and bias_hh_l0
            if not (_is_norm(layer) or is_bias):
                yield parameter


def _uses(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield each use of a parameter: the layer that has it, its name there, and itself.

    Whatever a parametrization computes a tensor from has the name of that tensor.
    """
    for path, parameter in model.named_parameters(remove_duplicate=False):
        layer, _, name = PARAMETRIZED.sub(r"\1\2", path).rpartition(".")
        yield model.get_submodule(layer), name, parameter


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises: torch's norms by class, others by their name."""
    return isinstance(module, NORMS) or THIRD_PARTY_NORM.search(type(module).__name__) is not None

"""A copy of a network in plain torch, and how far two networks differ."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmlightning.errors import InputError
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.layer_norm import LpLayerNorm, LpRMSNorm
from nmlightning.surgery.fuse.fuse import unfuse
from nmlightning.surgery.norm_layers import find_norm_layers
from nmlightning.surgery.swap import swap_norms
from nmlightning.weights.layer_weights import plain_modules


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


# Of |outputs|: float32 rounds to 6e-8 of a value, and a deep network does so hundreds of times.
TOLERANCE = 1e-5
# One may be special, and the second is that of the export; no batch is fixed then.
BATCH_SIZES = (1, 2, 5)
_SEED = 0


def draw_inputs(input_shape: Sequence[int], batch_size: int) -> Tensor:
    """Return standard normal inputs (batch_size, *input_shape), the same every time."""
    generator = torch.Generator().manual_seed(_SEED + batch_size)
    return torch.randn(batch_size, *input_shape, generator=generator)


@torch.no_grad()
def compute_outputs(
    net: Callable[[Tensor], object], input_shape: Sequence[int]
) -> dict[int, Tensor]:
    """Return the outputs of the network that is left, by batch size.

    Raises:
        InputError: it does not take such inputs, gives no tensor, or one that is not finite.
    """
    shape = ",".join(map(str, input_shape))
    outputs: dict[int, Tensor] = {}
    for size in BATCH_SIZES:
        try:
            output = net(draw_inputs(input_shape, size))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the network does not take inputs of shape {shape}: {reason}"
            ) from error
        if not isinstance(output, Tensor):
            raise InputError(
                f"the network returns a {type(output).__name__}; what can be exported returns one "
                "tensor."
            )
        if not output.isfinite().all():
            raise InputError(
                f"the network's outputs for standard normal inputs of shape {shape} are not "
                "finite: has its training diverged?"
            )
        outputs[size] = output
    return outputs


@torch.no_grad()
def largest_difference(
    net: Callable[[Tensor], Tensor], expected: dict[int, Tensor], input_shape: Sequence[int]
) -> float:
    """Return max |net(x) − y| / max |y| over all batches; infinite for other shapes or NaN.

    Args:
        net: what is compared.
        expected: y by batch size, as `compute_outputs` gives it.
        input_shape: of x, without its batch.
    """
    return max(
        _difference(net(draw_inputs(input_shape, size)), output)
        for size, output in expected.items()
    )


def _difference(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    largest = float((output.double() - expected.double()).abs().max())
    scale = float(expected.abs().max()) or 1.0
    return largest / scale if largest == largest else float("inf")

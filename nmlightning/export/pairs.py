"""Which batch norms follow a convolution or a linear layer, and why the others do not."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from nmlightning.export.traced_uses import TracedUses, name_source
from nmlightning.swappable import NormLayer, find_norm_layers

# Exactly these: a subclass may do something to its weight or its output.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True, eq=False)
class Pair:
    """A batch norm, and the convolution or linear layer whose output goes to it alone."""

    norm_name: str
    norm: _BatchNorm
    layer_name: str
    layer: nn.Module


@dataclass(frozen=True)
class Left:
    """A batch norm that cannot be folded, and why."""

    norm: str
    reason: str


def find_pairs(model: nn.Module) -> tuple[list[Pair], list[Left]]:
    """Return the batch norms that can be folded into what precedes them, and those that cannot."""
    norms = find_norm_layers(model)
    found = {x.module: x for x in reversed(norms) if _is_batch_norm(x)}
    layers = list(reversed(found.values()))  # once each, under the first name
    try:
        uses = TracedUses(model, [x.module for x in norms])
    except Exception as error:  # whatever a forward pass raises that is given no tensors
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"the network cannot be traced by torch.fx: {lines[0]}"
        return [], [Left(x.name, reason) for x in layers]
    names = {module: name for name, module in model.named_modules()}
    results = [_pair(layer, uses, names) for layer in layers]
    pairs = [result for result in results if isinstance(result, Pair)]
    return pairs, [result for result in results if isinstance(result, Left)]


def _is_batch_norm(layer: NormLayer) -> bool:
    return isinstance(layer.module, _BatchNorm) or "BatchNorm" in layer.type_name


def _pair(found: NormLayer, uses: TracedUses, names: dict[nn.Module, str]) -> Pair | Left:
    norm = found.module
    reason = _refuse_norm(found, uses)
    if reason:
        return Left(found.name, reason)
    layer, call = uses.source(uses.calls(norm)[0])
    if layer is None or call is None or type(layer) not in FOLDABLE:
        is_parametrized = layer is not None and parametrize.is_parametrized(layer)
        parametrized = " with a parametrized weight" if is_parametrized else ""
        return Left(found.name, f"it follows {name_source(layer, call)}{parametrized}")
    name = names[layer]
    reason = _refuse_layer(layer, name, uses)
    assert isinstance(norm, _BatchNorm), "others are refused"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if not reason and channels != norm.num_features:
        reason = f"its {norm.num_features} channels are not the {channels} outputs of {name}"
    if not reason and len(call.users) > 1:
        reason = f"the output of {name} also goes elsewhere"
    if reason:
        return Left(found.name, reason)
    return Pair(found.name, norm, name, layer)


def _refuse_norm(found: NormLayer, uses: TracedUses) -> str:
    norm = found.module
    if found.kind != "batch":
        return f"{found.type_name} is none of torch's own batch norms, nor of this package's"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if _has_hooks(norm):
        return "it has hooks"
    times = len(uses.calls(norm))
    if times != 1:
        return f"the network calls it {times} times" if times else "the traced network has no call"
    return "its state is used elsewhere, too" if uses.shares_tensors(norm) else ""


def _refuse_layer(layer: nn.Module, name: str, uses: TracedUses) -> str:
    if _has_hooks(layer) or "forward" in vars(layer):
        return f"{name} has hooks, or a forward of its own"
    times = len(uses.calls(layer))
    if times > 1:
        return f"the network calls {name} {times} times"
    return f"the weight of {name} is used elsewhere, too" if uses.shares_tensors(layer) else ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)

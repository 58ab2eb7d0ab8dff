"""Parameter groups by scope: which parameters decay, and which layer gives the output."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm as HookedWeightNorm

from nmlightning.errors import InputError, is_number, nearest
from nmlightning.name_patterns import some
from nmlightning.weights.layer_weights import find_layer_form, plain_modules


@dataclass(frozen=True)
class OutputLayers:
    """The layers whose weights give a model's output: one for most models, none where none does."""

    layers: list[nn.Module]
    doubt: str = ""  # why they are a guess that may be wrong
    candidates: tuple[str, ...] = ()  # the paths of those that may then be meant


def find_output_layers(model: nn.Module) -> OutputLayers:
    """Return the layers whose weights give a model's output.

    They are what `get_output_embeddings()` of the model, or of a part of it, returns, as in Hugging
    Face's models: an embedding, where the output is computed with its weight; or what timm's
    `get_classifier()` does. Of a model with neither they are the layer that is registered last, if
    any is an `nn.Linear` outside of an `nn.MultiheadAttention`, with those directly before it that
    do not lead into it, as CLIP's two projections.
    """
    for module in model.modules():
        of_timm = any(cls.__module__.startswith("timm.") for cls in type(module).__mro__)
        for getter in ("get_output_embeddings", *["get_classifier"] * of_timm):
            called = getattr(module, getter, None)
            given = called() if callable(called) else ()
            heads = given if isinstance(given, tuple | list) else (given,)
            found = nn.ModuleList([m for m in heads if isinstance(m, nn.Module)])
            layers = [m for m in found.modules() if _is_layer(m) or isinstance(m, nn.Embedding)]
            if layers:
                return OutputLayers(layers, *_doubt_of_later(model, layers))
    return _guess_output_layers(model)


def _is_layer(module: nn.Module) -> bool:
    in_attention = isinstance(module, NonDynamicallyQuantizableLinear)
    return find_layer_form(module) is not None and not in_attention


def _guess_output_layers(model: nn.Module) -> OutputLayers:
    paths = {module: path for path, module in plain_modules(model) if _is_layer(module)}
    linears = [layer for layer in paths if isinstance(layer, nn.Linear)]
    if not linears:
        return _doubt_of_convolutions(model, paths)
    *_, last = paths
    path = paths[last]
    heads = [last, *_heads_beside(model, path, list(paths))]
    heads += _heads_of_blocks(model, path, list(paths))
    heads += [m for m in _auxiliary_heads(model, path, list(paths)) if m not in heads]
    name = f"The output layer of {type(model).__name__} is not certain:"
    if len(heads) > 1:
        others = tuple(paths[head] for head in heads[1:])
        doubt = f"{name} {path} is its last, and {some(others)} beside it may not lead into it"
        return OutputLayers(heads, doubt, (path, *others))
    if last is not linears[-1]:
        linear = paths[linears[-1]]
        doubt = (
            f"{name} {path} ({type(last).__name__}) is its last, and its last nn.Linear {linear}"
        )
        return OutputLayers(heads, doubt, (path, linear))
    if _is_in_last_block(model, path):
        return OutputLayers(
            heads, f"{name} {path} is its last, in the last of like blocks", (path,)
        )
    return OutputLayers(heads)


def _doubt_of_later(
    model: nn.Module, found: Sequence[nn.Module]
) -> tuple[str, tuple[str, ...]] | tuple[()]:
    """Return the doubt where a linear layer outside of blocks is registered after those found."""
    paths = {module: path for path, module in plain_modules(model) if _is_layer(module)}
    *_, last = paths
    later = list(paths).index(last) > max(list(paths).index(m) if m in paths else -1 for m in found)
    known = [paths[m] for m in found if m in paths]
    if not (known and later and isinstance(last, nn.Linear)):
        return ()
    path = paths[last]
    if _is_in_last_block(model, path):
        return ()
    name = f"The output layer of {type(model).__name__} is not certain:"
    doubt = f"{name} {path} stands after {some(known)}, and may give an output, too"
    return doubt, (*known, path)


def _doubt_of_convolutions(model: nn.Module, paths: Mapping[nn.Module, str]) -> OutputLayers:
    """Return no layer, and the doubt where a convolution is last, with no norm behind it."""
    if len(paths) < 2:
        return OutputLayers([])
    *_, last = paths
    if any(_is_norm(m) for m in list(model.modules())[list(model.modules()).index(last) :]):
        return OutputLayers([])
    path = paths[last]
    heads = (path, *(paths[m] for m in _heads_of_blocks(model, path, list(paths), _ConvNd)))
    gives = "gives" if len(heads) == 1 else "give"
    doubt = f"{type(model).__name__} has no nn.Linear, and maybe {some(heads)} {gives} its output"
    return OutputLayers([], doubt, heads)


def _is_in_last_block(model: nn.Module, path: str) -> bool:
    """Return whether it is a layer within the last of several blocks, as an encoder's last is."""
    parts = path.split(".")
    for depth in range(len(parts) - 1):
        blocks = model.get_submodule(".".join(parts[:depth]))
        kinds = [type(block) for block in blocks.children()][-2:]
        in_list = isinstance(blocks, nn.ModuleList | nn.Sequential) and nn.Sequential not in kinds
        if in_list and len(kinds) == 2 and kinds[0] is kinds[1]:
            return True
    return False


def _heads_beside(model: nn.Module, path: str, layers: Sequence[nn.Module]) -> Iterator[nn.Linear]:
    """Yield layers registered directly before the last one that give outputs of their own.

    Those that take what it takes, or give as many outputs, but cannot lead into it; and, at the top
    of a model, those of its name but for what is before an underscore, of as many outputs.
    """
    parent, last = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    holds_all = set(layers) <= set(parent.modules())
    before = [(n, m) for n, m in parent.named_children() if any(x in m.modules() for x in layers)]
    kind = path.rpartition(".")[2].rpartition("_")
    if not isinstance(last, nn.Linear) or isinstance(parent, nn.Sequential):
        return
    for name, child in reversed(before[:-1]):
        linears = [m for m in child.modules() if isinstance(m, nn.Linear) and m in layers]
        if not linears:
            return
        head, (prefix, _, suffix) = linears[-1], name.rpartition("_")
        same = head.in_features == last.in_features, head.out_features == last.out_features
        apart = child is head and head.out_features != last.in_features and any(same)
        named = holds_all and prefix and suffix == kind[2] and same[1]
        if not apart and (not named or {prefix, kind[0]} & _INNER):
            return
        yield head


def _auxiliary_heads(
    model: nn.Module, path: str, layers: Sequence[nn.Module]
) -> Iterator[nn.Linear]:
    """Yield what ends blocks at the top with as many outputs as the last layer, as GoogLeNet's."""
    parent, last = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    if isinstance(parent, nn.Sequential) or not set(layers) <= set(parent.modules()):
        return
    for block in parent.children():
        head = [None, *(m for m in block.modules() if m in layers)][-1]
        if not isinstance(head, nn.Linear) or head in (block, last):
            continue
        if head.out_features == _outputs(last) != _inputs(last):
            yield head


def _heads_of_blocks(
    model: nn.Module, path: str, layers: Sequence[nn.Module], kind: type[nn.Module] = nn.Linear
) -> Iterator[nn.Module]:
    """Yield the last layers of blocks directly before that of the last one, as of DETR and SigLIP.

    Of those that take what it takes, or give as many outputs, but cannot lead into it.
    """
    parts, last = path.split("."), model.get_submodule(path)
    for depth in range(len(parts) - 1):
        parent = model.get_submodule(".".join(parts[:depth]))
        inner = [[m for m in block.modules() if m in layers] for block in parent.children()]
        *before, own = [block for block in inner if block]
        for block in () if isinstance(parent, nn.Sequential | nn.ModuleList) else reversed(before):
            first, head = block[0], block[-1]
            if not isinstance(head, kind) or _outputs(head) == _inputs(own[0]):
                break
            if _outputs(head) != _outputs(last) and _inputs(first) != _inputs(own[0]):
                break
            yield head


def _inputs(layer: Any) -> int:
    return getattr(layer, "in_features", getattr(layer, "in_channels", 0))


def _outputs(layer: Any) -> int:
    return getattr(layer, "out_features", getattr(layer, "out_channels", -1))


_INNER = {*("q", "k", "v", "o", "query", "key", "value"), *("in", "out", "up", "down", "gate")}


WeightDecayScope = Literal["all", "no_norm", "no_conv", "last_layer"]

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
THIRD_PARTY_NORM = re.compile(r"norm(act)?(\dd)?$", re.IGNORECASE)  # RmsNorm2d, LlamaRMSNorm, …
HOOKED = re.compile(r"(_orig|_v|_g)+$")  # pruning, torch's old spectral norm and weight norm
PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\..*$")  # bn.….weight.original


def parameter_groups(
    model: nn.Module, weight_decay: float | None, scope: WeightDecayScope = "all"
) -> list[dict[str, Any]]:
    """Return the groups to hand to an optimizer, so that only the parameters in `scope` decay.

    Args:
        model: holds the parameters. Every trainable one is in exactly one group, also when modules
            share it (it decays if one of its uses does); frozen ones are left out.
        weight_decay: λ ≥ 0 of the decaying group; None leaves it to the optimizer's own setting.
        scope: `all`; `no_norm`, all but the parameters of normalization layers, gains of weight
            norm and biases; `no_conv`, all but the weights of convolutions and what they are
            computed from, for a rule that decays them itself; or `last_layer`, only that of
            `find_output_layers`, mostly the last `nn.Linear` (the "weight decay off" of the paper's
            study: https://arxiv.org/abs/1803.01814, figure 1), with a warning where it is a guess.

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
        output = find_output_layers(model)
        if output.doubt:
            decays = " and ".join(output.candidates[: len(output.layers)])
            warnings.warn(f"{output.doubt}; what decays is {decays}.", stacklevel=4)
        if not output.layers:
            raise InputError(
                f"weight-decay scope 'last_layer' needs an nn.Linear, and {type(model).__name__} "
                "has none: choose 'all' or 'no_norm'."
            )
        for layer in output.layers:
            yield from layer.parameters()
    elif scope == "no_conv":
        convolved = {
            id(parameter)
            for layer, name, parameter in _uses(model)
            if name == "weight" and (find_layer_form(layer) or ("",))[0] == "conv"
        }
        yield from (q for q in model.parameters() if id(q) not in convolved)
    else:
        gains = set(_gains(model))
        for layer, name, parameter in _uses(model):
            is_bias = "bias" in name.split("_")  # as in in_proj_bias and bias_hh_l0
            if not (_is_norm(layer) or is_bias or id(parameter) in gains):
                yield parameter


def _uses(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield each use of a parameter: the layer that has it, its name there, and itself.

    Whatever a parametrization or a hook of torch computes a tensor from has that tensor's name.
    """
    for path, parameter in model.named_parameters(remove_duplicate=False):
        layer, _, name = PARAMETRIZED.sub(r"\1\2", path).rpartition(".")
        module = model.get_submodule(layer)
        computed = HOOKED.sub("", name)
        yield module, name if computed in module._parameters else computed, parameter


def _gains(model: nn.Module) -> Iterator[int]:
    """Yield the ids of the gains g of weights w = g v / ‖v‖: torch's, of hooks too, and ours."""
    for module in model.modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm):
            yield id(module.original0)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, HookedWeightNorm):
                yield id(getattr(module, f"{hook.name}_g"))
        if type(module).__name__ == "WeightNorm" and "gain" in module._parameters:
            yield id(module.gain)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises: torch's norms by class, others by their name."""
    return isinstance(module, NORMS) or THIRD_PARTY_NORM.search(type(module).__name__) is not None

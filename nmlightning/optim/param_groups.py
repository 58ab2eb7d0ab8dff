"""Parameter groups by scope: which parameters decay, and which layer gives the output."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm as HookedWeightNorm
from torch.optim import SGD

from nmlightning.errors import InputError, check_choice, check_weight_decay, nearest
from nmlightning.name_patterns import some
from nmlightning.optim.scope import MATRICES, Choice, Scope, choose_weights
from nmlightning.weights.layer_weights import find_layer_form, is_norm, kind_of, plain_modules


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
    any is an `nn.Linear` outside of an `nn.MultiheadAttention`, and those whose outputs no layer
    takes, by their number, or that are named like a head; a last layer whose outputs one of these
    takes is none.
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
    kinds = nn.Linear if last is linears[-1] else nn.Module
    ends = [end for end in _find_ends(model, paths, kinds) if end is not last]
    n = _outputs(last)
    leads = any(n in _inputs(end) and n != _outputs(end) for end in ends)
    heads = ends if leads else [last, *ends]
    before = some([paths[end] for end in ends])
    doubt, others = "", [last] * leads
    if leads:
        doubt = f"by its shape may lead into {before}"
    elif ends:
        doubt = f"and {before} beside it may not lead into it"
    elif last is not linears[-1]:
        doubt, others = f"and its last nn.Linear {paths[linears[-1]]}", [*linears[-1:]]
    else:
        inner = _in_blocks(model)  # which may hold it, or take as many features as it gives
        taken = any(n in _inputs(m) for m in inner if isinstance(m, nn.Linear))
        if taken or last in inner or "pooler" in paths[last]:
            doubt = "and may give what other layers take"
    if not doubt:
        return OutputLayers(heads)
    kind = "" if last is linears[-1] else f" ({type(last).__name__})"
    name = f"The output layer of {type(model).__name__} is not certain: {paths[last]}{kind}"
    paths_of = tuple(paths[layer] for layer in (*heads, *others))
    return OutputLayers(heads, f"{name} is its last, {doubt}", paths_of)


def _doubt_of_later(
    model: nn.Module, found: Sequence[nn.Module]
) -> tuple[str, tuple[str, ...]] | tuple[()]:
    """Return the doubt where linear layers beside those found may give an output, too."""
    paths = {module: path for path, module in plain_modules(model) if _is_layer(module)}
    known = [paths[m] for m in found if m in paths]
    ends = [paths[m] for m in _find_ends(model, paths, nn.Linear) if m not in found]
    if not (known and ends):
        return ()
    name = f"The output layer of {type(model).__name__} is not certain:"
    doubt = f"{name} beside {some(known)}, {some(ends)} may give an output, too"
    return doubt, (*known, *ends)


def _doubt_of_convolutions(model: nn.Module, paths: Mapping[nn.Module, str]) -> OutputLayers:
    """Return no layer, and the doubt where convolutions with no norm behind them may be last."""
    if len(paths) < 2:
        return OutputLayers([])
    modules = [m for m in model.modules() if m in paths or is_norm(m)]
    normalised = {m for m, after in pairwise(modules) if is_norm(after)}
    heads = tuple(paths[m] for m in _find_ends(model, paths, _ConvNd) if m not in normalised)
    gives = "gives" if len(heads) == 1 else "give"
    doubt = f"{type(model).__name__} has no nn.Linear, and maybe {some(heads)} {gives} its output"
    return OutputLayers([], doubt, heads) if heads else OutputLayers([])


def _find_ends(
    model: nn.Module, paths: Mapping[nn.Module, str], kind: type[nn.Module]
) -> list[nn.Module]:
    """Return the layers outside of like blocks that may give an output, from the last one on.

    Those are that one, those whose outputs no other layer takes, by their number, and those of as
    many outputs that are named like a head or that end a module with such a name.
    """
    named = {
        [None, *(m for m in module.modules() if m in paths)][-1]: found["own"]
        for path, module in plain_modules(model)
        if (found := _HEAD.search(path))
    }
    *_, last = paths
    takes = {m: _inputs(m) for m in model.modules()}
    inner, ends = _in_blocks(model), []
    for layer, after in pairwise([*paths, None]):
        if isinstance(layer, kind) and layer not in inner:
            n = _outputs(layer)
            is_image = isinstance(after, _ConvNd) and n % after.in_channels == 0  # a view of it
            taken = is_image or any(n in takes[m] for m in takes if m is not layer)
            is_named = layer in named and (named[layer] or n == _outputs(last))
            if is_named or not taken or layer is last:
                ends.append(layer)
        if isinstance(layer, _ConvNd):
            del takes[layer]  # what comes later it does not take: classes are no image's colours
    return ends[::-1]


def _in_blocks(model: nn.Module) -> set[nn.Module]:
    """Return what is within one of several blocks of a class, as in an encoder."""
    inner = set()
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(m) for m in blocks.children() if not isinstance(m, nn.Sequential))
            alike = [m for m in blocks.children() if kinds[type(m)] > 1]
            inner |= {m for block in alike for m in block.modules() if m is not block}
    return inner


def _inputs(module: nn.Module) -> set[int]:
    return {n for name in _INPUTS if isinstance(n := getattr(module, name, None), int)}


def _outputs(layer: Any) -> int:
    n: int = getattr(layer, "out_features", getattr(layer, "out_channels", -1))
    return n


_INPUTS = (
    *("in_features", "in_channels", "input_size", "embed_dim", "kdim", "vdim"),
    *("in1_features", "in2_features"),
)
_HEAD = re.compile(
    r"(^|[._])(heads?|classifier|policy|actor|critic|projection|fc_out|(?P<own>g|generator))$",
    re.IGNORECASE,
)


WeightDecayScope = Literal["all", "no_norm", "no_conv", "last_layer"]

HOOKED = re.compile(r"(?<=^weight)_\w+$|(?<=^bias)_\w+$|(_orig|_v|_g)+$")  # weight_v, weight_bar
PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\..*$")  # bn.….weight.original


def parameter_groups(
    model: nn.Module,
    weight_decay: float | None,
    scope: WeightDecayScope | Literal["scale_invariant"] = "all",
    split: Literal["muon"] | None = None,
) -> list[dict[str, Any]]:
    """Return the groups to hand to an optimizer, so that only the parameters in `scope` decay.

    Args:
        model: holds the parameters. Every trainable one is in exactly one group, also when modules
            share it (it decays if one of its uses does); frozen ones are left out.
        weight_decay: λ ≥ 0 of the decaying group; None leaves it to the optimizer's own setting.
        scope: `all`; `no_norm`, all but the parameters of normalization layers, gains of weight
            norm and biases; `no_conv`, all but the weights of convolutions and what they are
            computed from, for a rule that decays them itself; `last_layer`, only that of
            `find_output_layers`, mostly the last `nn.Linear` (the "weight decay off" of the paper's
            study: https://arxiv.org/abs/1803.01814, figure 1), with a warning where it is a guess;
            or `scale_invariant`, the weights whose norm the loss does not depend on, as measured on
            the gradients that they have now: run backward before.
        split: "muon" marks each group by `use_muon`. True are the matrices of hidden layers: the
            weights of two dimensions of linear layers and of attention, but for the output layer
            and whatever is shared with it or with an embedding. False is the rest, for AdamW:
            convolutions too, which torch.optim.Muon does not take.

    Returns:
        Dictionaries with `params`, and `weight_decay`: λ, then 0; at most two, or two of each mark.
        None is empty.

    Raises:
        InputError: for another scope or split, a negative λ, a model in which nothing can be
            trained, `last_layer` where the model has no `nn.Linear`, or `scale_invariant` where no
            weight has a gradient.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10))
        >>> [len(group["params"]) for group in parameter_groups(model, 5e-4, "no_norm")]
        [2, 4]
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> groups = parameter_groups(model, 0.1, split="muon")
        >>> [(group["use_muon"], len(group["params"])) for group in groups]
        [(True, 1), (False, 3)]
        >>> from torch.optim import Muon
        >>> muon = Muon([group for group in groups if group["use_muon"]])
    """
    allowed = (*get_args(WeightDecayScope), "scale_invariant")
    if scope not in allowed:
        raise InputError(
            f"weight-decay scope {scope!r} is not one of {', '.join(allowed)}."
            f"{nearest(str(scope), allowed)}"
        )
    if weight_decay is not None:
        check_weight_decay(weight_decay)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{type(model).__name__} has no trainable parameter to optimize.")
    check_choice("split", split, (None, "muon"))
    decaying = set(_decaying(model, scope))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = set(_hidden_matrices(model)) if split else set()
    groups = []
    for is_hidden, decays in product((True, False), repeat=2):
        members = [p for p in trainable if ((p in hidden), (p in decaying)) == (is_hidden, decays)]
        group: dict[str, Any] = {"params": members, "weight_decay": weight_decay if decays else 0.0}
        if group["weight_decay"] is None:
            del group["weight_decay"]
        groups += [group | ({"use_muon": is_hidden} if split else {})]
    return [group for group in groups if group["params"]]


def _hidden_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the matrices of linear layers and of attention that are used in no other way."""
    output = find_output_layers(model)
    inner = _in_blocks(model) if output.doubt else set()  # a backbone's last block is like others
    heads = [layer for layer in output.layers if layer not in inner]
    if output.doubt and heads:
        left = some(output.candidates[: len(output.layers)])
        warnings.warn(f"{output.doubt}; what is left to AdamW as such is {left}.", stacklevel=4)
    uses, gains = dict[nn.Parameter, list[bool]](), set(_gains(model))
    for layer, name, parameter in _uses(model):
        hidden = kind_of(layer) == "linear" and layer not in heads and parameter.dim() == 2
        is_weight = "weight" in name.split("_") and id(parameter) not in gains
        uses.setdefault(parameter, []).append(hidden and is_weight)
    yield from (parameter for parameter, each in uses.items() if all(each))


def _decaying(model: nn.Module, scope: str) -> Iterator[nn.Parameter]:
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
    elif scope == "scale_invariant":
        yield from _scale_invariant(model)
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
            if not (is_norm(layer) or is_bias or id(parameter) in gains):
                yield parameter


def _scale_invariant(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that prove to be so by the gradients that they have."""
    optimizer, scope = SGD(model.parameters(), lr=0.0), Scope(insists=False)
    weights = choose_weights(optimizer, model, Choice((), (), MATRICES))
    if all(weight.gradient is None for weight in weights):
        raise InputError(
            "weight-decay scope 'scale_invariant' measures gradients, and there are none: run "
            "backward of the loss of a batch first."
        )
    for weight in weights:
        scope.measure(weight)
        scope.take(weight)
        if scope.passes(weight.name):
            yield weight.parameter  # type: ignore[misc]


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
        if hasattr(module, "channel_norms") and module.gain is not None:  # as a `WeightNorm`
            yield id(module.gain)

"""The weights of a model's layers: their names, the tensors that hold them, their channels."""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as HookedWeightNorm

from nmlightning.errors import InputError, check_lists
from nmlightning.name_patterns import matches, plain_name, some, unmatched
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    gather_channels,
    is_flat,
    is_sharded,
    join_norms,
    local_norms,
)

LayerKind = Literal["conv", "linear", "recurrent", "embedding"]
LayerForm = tuple[LayerKind, ChannelLayout]
_INPUTS_FIRST: LayerForm = "linear", ChannelLayout(transposed_groups=1)
# Layers of other packages, by class: their kind, and where the output channels of `weight` are.
_OTHERS: dict[str, LayerForm] = {
    "transformers.pytorch_utils.Conv1D": _INPUTS_FIRST,
    "transformers.modeling_utils.Conv1D": _INPUTS_FIRST,  # there until transformers 4.16
    "torchvision.ops.deform_conv.DeformConv2d": ("conv", ROWS),
    "torch_geometric.nn.dense.linear.Linear": ("linear", ROWS),
}


def find_layer_form(module: nn.Module) -> LayerForm | None:
    """Return which kind of layer it is, and its layout; None for what has no such `weight`."""
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        return "conv", ChannelLayout(module.groups) if transposed else ROWS
    if isinstance(module, nn.Linear):
        return "linear", ROWS
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_OTHERS[name] for name in names if name in _OTHERS), None)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return of which kind a layer is; None for what has no weight of its own, and for others."""
    form = find_layer_form(module)
    if form is not None:
        return form[0]
    if isinstance(module, nn.MultiheadAttention | nn.Bilinear):
        return "linear"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "embedding" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


def weights_of(module: nn.Module) -> list[str]:
    """Return the names of the weights that a layer of some kind computes with.

    Those of `nn.MultiheadAttention` are its projections into heads, three where their widths
    differ; the one out of them is an `nn.Linear` inside it. Those of a recurrent layer are its
    matrices, those that `proj_size` adds too.
    """
    if isinstance(module, nn.MultiheadAttention):
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return ["in_proj_weight"] if module._qkv_same_embed_dim else names
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight_")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return [] if kind_of(module) is None else ["weight"]


TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMED_LIKE_A_NORM = re.compile(
    r"(?i:(Batch|Layer|Group|Instance|RMS|Response|L2)_?Norm|(?<!Weight)(?<!Spectral)Norm(\dd)?$)"
    r"|(?<!Weight)(?<!Spectral)Norm(?![a-z]|Linear)|GRN$"
)


def is_norm(module: nn.Module) -> bool:
    """Return whether it is a norm of torch's, or named like one, with no layer of weights in it."""
    if isinstance(module, TORCH_NORMS):
        return True
    named_like_one = _NAMED_LIKE_A_NORM.search(type(module).__name__) is not None
    return named_like_one and not any(map(weights_of, module.modules()))


_SUFFIX = "_v"
_BEHIND = ("_v", "_orig", "_v_orig", "_orig_orig")


@dataclass(frozen=True, eq=False)
class WeightLocation:
    """An attribute of a module that is a weight; layers may share one weight."""

    module: nn.Module
    path: str
    attribute: str

    @property
    def name(self) -> str:
        """As in `model.named_parameters()`, without what wrappers and parametrizations add."""
        return plain_name(f"{self.path}.{self.attribute}".lstrip("."))

    @property
    def layout(self) -> ChannelLayout:
        form = find_layer_form(self.module)
        return form[1] if form is not None and self.attribute == "weight" else ROWS

    @property
    def is_known(self) -> bool:
        """Whether its layer is of a class whose output channels are known."""
        modules = (cls.__module__ for cls in type(self.module).__mro__)
        known = sum(name.startswith("torch.nn.modules.") for name in modules)
        is_list = isinstance(self.module, nn.ParameterList | nn.ParameterDict)
        has_form = find_layer_form(self.module) is not None
        return has_form or (known > 1 and not is_list)  # nn.Module is one

    @property
    def parametrizations(self) -> ParametrizationList | None:
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        return self.module.parametrizations[self.attribute]  # type: ignore[index, return-value]

    @property
    def kind(self) -> LayerKind | None:
        """The kind of its layer, if that computes with it."""
        return kind_of(self.module) if self.attribute in weights_of(self.module) else None

    @property
    def is_recorded(self) -> bool:
        return self.kind not in (None, "embedding")

    @property
    def is_computed(self) -> bool:
        """Whether it is no parameter, but made of some by a parametrization or a hook."""
        return self.module._parameters.get(self.attribute) is None

    def norms_of(self, parameter: Tensor) -> Tensor:
        """Return ‖w_i‖₂, (C,), of what is computed from `parameter` and others."""
        if self.norm is not None:
            norms: Tensor = self.norm.channel_norms(parameter)
            return norms
        return gather_channels(channel_norms(self.compute(), layout=self.layout))

    @torch.no_grad()
    def compute(self) -> Tensor:
        """Return a computed weight as in evaluation, where nothing advances a power iteration."""
        computed = self.parametrizations
        if computed is None:  # torch's hooks compute it, for a shallow copy
            stand_in = copy.copy(self.module)
            stand_in.training = False
            for hook in self.module._forward_pre_hooks.values():
                if isinstance(hook, HookedWeightNorm | SpectralNorm | BasePruningMethod):
                    hook(stand_in, None)
            return getattr(stand_in, self.attribute)  # type: ignore[no-any-return]
        whole = {
            name: gather_channels(q) for name, q in computed.named_parameters() if is_sharded(q)
        }
        training = [module for module in computed.modules() if module.training]
        try:
            for module in training:
                module.training = False
            w: Tensor = torch.func.functional_call(computed, whole, ()) if whole else computed()
        finally:
            for module in training:
                module.training = True
        return w

    @property
    def is_lazy(self) -> bool:
        parameter = self.module._parameters.get(self.attribute)
        return parameter is not None and is_lazy(parameter)

    @property
    def norm(self) -> Any:
        """Its one parametrization, if that knows the norms of what it computes."""
        computed = self.parametrizations
        norm = computed[0] if computed is not None and len(computed) == 1 else None
        return norm if hasattr(norm, "channel_norms") else None

    @property
    def original(self) -> Tensor | None:
        """The parameter behind it that has its shape, without computing it anew.

        It is `weight_v` under the old `torch.nn.utils.weight_norm`, `weight_orig` if it is pruned,
        and of one that is both `weight_v_orig`.
        """
        if self.is_lazy:
            return None
        computed = self.parametrizations
        if computed is None:
            names = [self.attribute + suffix for suffix in ("", *_BEHIND)]
            held = (self.module._parameters.get(name) for name in names)
            return next((parameter for parameter in held if parameter is not None), None)
        originals = list(computed.parameters(recurse=False))
        if isinstance(self.module, nn.Linear | _ConvNd):
            shape = _weight_shape(self.module)
        elif len(originals) == 1:
            return originals[0]
        else:
            shape = tuple(self.compute().shape)
        return next((original for original in originals if original.shape == shape), None)

    def is_chosen(
        self, include: Sequence[str], exclude: Sequence[str], recorded: bool = False
    ) -> bool:
        is_layer = self.is_recorded if recorded else find_layer_form(self.module) is not None
        by_default = is_layer or self.norm is not None
        is_included = matches(self.name, include) if include else by_default
        return is_included and not matches(self.name, exclude)

    def weight(self) -> "LayerWeight":
        """Return it, as the unnormalised weight if it is normalised."""
        parameter = self.original
        assert parameter is not None
        return LayerWeight(self.name + _SUFFIX * (self.norm is not None), parameter, self.layout)


def find_places(model: nn.Module) -> Iterator[WeightLocation]:
    """Yield the weight of each layer, also where it is no parameter, and all others."""
    for path, module in plain_modules(model):
        names = weights_of(module)
        if find_layer_form(module) is None:
            behind = {name + suffix for name in names for suffix in (*_BEHIND, "_g")}
            names += [name for name in matrices(module) if name not in {*names, *behind}]
        for attribute in names:
            yield WeightLocation(module, path, attribute)


def matrices(module: nn.Module) -> Iterator[str]:
    """Yield the parameters of two or more dimensions, then those that are computed.

    Parameters that have no shape yet, or that FSDP1 flattened, may be weights, too.
    """
    for attribute, q in module._parameters.items():
        if q is not None and (is_lazy(q) or q.dim() >= 2 or is_flat(q)):
            yield attribute
    if parametrize.is_parametrized(module):
        yield from module.parametrizations  # type: ignore[misc]


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with their paths, but for those that compute weights."""
    for path, module in model.named_modules():
        if "parametrizations" not in path.split("."):
            yield path, module


LAZY_WAY_OUT = "run a batch through the model before the fit"


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of one layer."""

    # As in `model.named_parameters()`, without what wrappers and parametrizations add; that of the
    # unnormalised weight v behind a normalised one ends in `_v`.
    name: str
    parameter: Tensor  # what an optimizer moves; of a parametrized or pruned weight its original
    layout: ChannelLayout = ROWS  # where its output channels are
    # For a weight that is computed, what computes its norms from `parameter`.
    computed: Callable[[Tensor], Tensor] | None = None

    def norms(self) -> Tensor:
        """Return ‖w_i‖₂, (C,), of all ranks' channels; every rank has to ask."""
        if self.computed is not None:
            return self.computed(self.parameter)
        held, layouts = [self.parameter], [self.layout]
        return join_norms(local_norms(held, layouts), held, layouts)[0]

    @property
    def channels(self) -> int:
        return self.layout.channels(self.parameter.shape)


def find_layer_weights(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    recorded: bool = False,
) -> list[LayerWeight]:
    """Return the weights of all convolutions and linear layers, and all that are normalised.

    A weight that layers share appears once, under its first name. A lazy layer has none before its
    first batch. Patterns to `include` are on names of parameters of two or more dimensions, also
    those of an embedding or an LSTM. Without any, `recorded` means also the projections into heads
    of attention, and the weights of `nn.Bilinear` and of recurrent layers, whose output channels
    are rows.

    Raises:
        InputError: a pattern that matches no such weight; none left.
    """
    check_lists(include=include, exclude=exclude)
    places = list(find_places(model))
    names = [place.name for place in places]
    check_patterns(model, (*include, *exclude), names, some(names, 8))
    chosen = [place for place in reversed(places) if place.is_chosen(include, exclude, recorded)]
    weights = {id(p.original): p.weight() for p in chosen if p.original is not None}
    if not weights:
        lazy = find_lazy_weights(model)
        but = f" but {lazy[0]}, which has no shape yet; {LAZY_WAY_OUT}" if lazy else ""
        raise InputError(
            f"{type(model).__name__} has no convolution or linear layer to watch{but}."
        )
    return list(reversed(weights.values()))


def check_patterns(
    model: nn.Module, patterns: Sequence[str], names: Collection[str], known: str
) -> None:
    """Raise InputError for the first pattern that matches none of the names of weights."""
    wrong = unmatched(patterns, names)
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no weight of two or more dimensions in "
            f"{type(model).__name__}; there is {known}."
        )


def find_recorded_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the same, and for each that is computed both the weight w and, as `…_v`, what from.

    See `find_layer_weights`.
    """
    places = {id(p.original): p for p in reversed(list(find_places(model))) if p.is_computed}
    computed, held = [], []
    for weight in find_layer_weights(model, include, exclude, recorded=True):
        place = places.get(id(weight.parameter))
        if place is not None:
            computed.append(replace(weight, name=place.name, computed=place.norms_of))
            weight = replace(weight, name=place.name + _SUFFIX)
        held.append(weight)
    return [*computed, *held]


def find_left_weights(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, str]:
    """Return the matrices that are recorded only where they are named, and why.

    Those of unknown classes have more than one element along two or more dimensions.
    """
    left, places = {}, list(find_places(model))
    held = {id(place.original) for place in places if place.is_recorded}
    for place in places:
        parameter = place.original
        if place.norm is not None or matches(place.name, exclude):
            continue
        if kind_of(place.module) == "embedding" and id(parameter) not in held:
            left[place.name] = "an embedding's rows are not output channels"
        elif parameter is None:
            if place.is_recorded and not place.is_lazy and place.is_computed:
                known = place.parametrizations is not None
                how = "from parameters of other shapes" if known else "in a way that is not known"
                left[place.name] = f"it is computed {how}"
        elif not place.is_known and sum(length > 1 for length in parameter.shape) > 1:
            left[place.name] = f"{type(place.module).__name__} is not a known layer"
    return left


def find_lazy_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the weights, chosen so, that have no shape before their first batch."""
    return [p.name for p in find_places(model) if p.is_lazy and p.is_chosen(include, exclude)]


def _weight_shape(module: nn.Linear | _ConvNd) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    inputs, outputs = module.in_channels, module.out_channels
    first, second = (inputs, outputs) if isinstance(module, _ConvTransposeNd) else (outputs, inputs)
    return (first, second // module.groups, *module.kernel_size)

"""The weights of a model's layers: their names, the tensors that hold them, their channels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nmlightning.errors import InputError
from nmlightning.name_patterns import check_lists, matches, some, unmatched
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms, gather_channels
from nmlightning.weights.plain_name import plain_name

_HIDDEN = "_v"
LAZY_WAY_OUT = "run a batch through the model before the fit"


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of one convolution or linear layer.

    Attributes:
        name: as in `model.named_parameters()`, without what wrappers and parametrizations add; that
            of the hidden weight v behind one that is normalised ends in `weight_v`.
        parameter: what an optimizer moves; of a parametrized or pruned weight its original.
        layout: where its output channels are.
        computed: for the normalised weight itself, what computes its norms from `parameter`.
    """

    name: str
    parameter: Tensor
    layout: ChannelLayout = ROWS
    computed: Callable[[Tensor], Tensor] | None = None

    def norms(self) -> Tensor:
        """Return ‖w_i‖₂, (C,), of all ranks' channels; every rank has to ask."""
        if self.computed is not None:
            return self.computed(self.parameter)
        return gather_channels(channel_norms(self.parameter, layout=self.layout))

    @property
    def channels(self) -> int:
        """How many output channels it has."""
        return self.layout.channels(self.parameter.shape)


def find_layer_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the weights of all convolutions, transposed ones too, and linear layers.

    A weight that layers share appears once, under its first name. A lazy layer has none before its
    first batch.

    Args:
        model: any module.
        include: glob patterns on names such as `layer1.*.weight`; empty means all.
        exclude: glob patterns on names that are left out.

    Raises:
        InputError: a pattern that matches no such weight; none left.
    """
    check_lists(include=include, exclude=exclude)
    weights = list(_all_layer_weights(model))
    lazy = find_lazy_weights(model)
    names = [*map(_base_name, weights), *lazy]
    wrong = unmatched((*include, *exclude), names)
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no weight of a convolution or linear layer of "
            f"{type(model).__name__}; there is {some(names, 8)}."
        )
    chosen = [weight for weight in weights if _is_chosen(_base_name(weight), include, exclude)]
    if not chosen:
        but = f" but {lazy[0]}, which has no shape yet; {LAZY_WAY_OUT}" if lazy else ""
        raise InputError(
            f"{type(model).__name__} has no convolution or linear layer to watch{but}."
        )
    return chosen


def find_recorded_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the same, and for each that is normalised both the weight w and the hidden v.

    See `find_layer_weights`.
    """
    norms = {id(q): norm.channel_norms for q, norm in _weight_norms(model)}
    weights = find_layer_weights(model, include, exclude)
    return [
        *(
            replace(weight, name=_base_name(weight), computed=norms[id(weight.parameter)])
            for weight in weights
            if id(weight.parameter) in norms
        ),
        *weights,
    ]


def find_lazy_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Return the names of the weights, chosen so, that have no shape before their first batch."""
    names = [_name_of(name) for name, layer in _layers(model) if _is_lazy(layer)]
    return [name for name in names if _is_chosen(name, include, exclude)]


def _is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or matches(name, include)) and not matches(name, exclude)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | _ConvNd]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            yield name, module


def _name_of(layer: str) -> str:
    return plain_name(f"{layer}.weight" if layer else "weight")


def _is_lazy(layer: nn.Linear | _ConvNd) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and is_lazy(weight)


def _all_layer_weights(model: nn.Module) -> Iterator[LayerWeight]:
    seen = set()
    for name, module in _layers(model):
        parameter = _original(module)
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            layout = ROWS
            if isinstance(module, _ConvTransposeNd):
                layout = ChannelLayout(module.groups)
            suffix = _HIDDEN if _weight_norm(module) is not None else ""
            yield LayerWeight(_name_of(name) + suffix, parameter, layout)


def _weight_norms(model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    for _, module in _layers(model):
        norm = _weight_norm(module)
        if norm is not None:
            yield module.parametrizations["weight"].original, norm  # type: ignore[index, union-attr]


def _weight_norm(module: nn.Module) -> Any:
    """Return the one parametrization of a weight that knows the norms of what it computes."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    norms = list(module.parametrizations["weight"])  # type: ignore[index]
    return norms[0] if len(norms) == 1 and hasattr(norms[0], "channel_norms") else None


def _base_name(weight: LayerWeight) -> str:
    """Return the name of the weight that the model computes with."""
    return weight.name.removesuffix(_HIDDEN)


def _original(module: nn.Linear | _ConvNd) -> Tensor | None:
    """Return the parameter behind `weight` that has its shape, without computing it anew.

    It is `weight_v` under the old `torch.nn.utils.weight_norm`, `weight_orig` where it is pruned.
    """
    if _is_lazy(module):
        return None
    if not parametrize.is_parametrized(module, "weight"):
        held = (module._parameters.get(name) for name in ("weight", "weight_v", "weight_orig"))
        return next((parameter for parameter in held if parameter is not None), None)
    shape = _weight_shape(module)
    originals = module.parametrizations["weight"].parameters(recurse=False)  # type: ignore[index, union-attr]
    return next((original for original in originals if original.shape == shape), None)


def _weight_shape(module: nn.Linear | _ConvNd) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    inputs, outputs = module.in_channels, module.out_channels
    first, second = (inputs, outputs) if isinstance(module, _ConvTransposeNd) else (outputs, inputs)
    return (first, second // module.groups, *module.kernel_size)

"""The weights of a model's layers: their names, the tensors that hold them, their channels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from nmlightning.errors import InputError
from nmlightning.name_patterns import matches, some, unmatched
from nmlightning.weights.channel_norms import ROWS, ChannelLayout
from nmlightning.weights.plain_name import plain_name


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of one convolution or linear layer.

    Attributes:
        name: as in `model.named_parameters()`, without what wrappers and parametrizations add.
        parameter: what an optimizer moves; of a parametrized weight its original.
        layout: where its output channels are.
    """

    name: str
    parameter: Tensor
    layout: ChannelLayout = ROWS


def find_layer_weights(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LayerWeight]:
    """Return the weights of all convolutions, transposed ones too, and linear layers.

    A weight that layers share appears once, under its first name.

    Args:
        model: any module.
        include: glob patterns on names such as `layer1.*.weight`; empty means all.
        exclude: glob patterns on names that are left out.

    Raises:
        InputError: a pattern that matches no such weight; none left.
    """
    weights = list(_all_layer_weights(model))
    names = [weight.name for weight in weights]
    wrong = unmatched((*include, *exclude), names)
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no weight of a convolution or linear layer of "
            f"{type(model).__name__}; there is {some(names, 8)}."
        )
    chosen = [
        weight
        for weight in weights
        if (not include or matches(weight.name, include)) and not matches(weight.name, exclude)
    ]
    if not chosen:
        raise InputError(f"{type(model).__name__} has no convolution or linear layer to watch.")
    return chosen


def _all_layer_weights(model: nn.Module) -> Iterator[LayerWeight]:
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)):
            continue
        parameter = _original(module)
        if parameter is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            layout = ROWS
            if isinstance(module, _ConvTransposeNd):
                layout = ChannelLayout(module.groups)
            full_name = f"{name}.weight" if name else "weight"
            yield LayerWeight(plain_name(full_name), parameter, layout)


def _original(module: nn.Linear | _ConvNd) -> Tensor | None:
    """Return the tensor behind `weight` that has its shape, without computing the weight anew."""
    if not parametrize.is_parametrized(module, "weight"):
        return None if is_lazy(module.weight) else module.weight
    shape = _weight_shape(module)
    originals = module.parametrizations["weight"].parameters(recurse=False)  # type: ignore[index, union-attr]
    return next((original for original in originals if original.shape == shape), None)


def _weight_shape(module: nn.Linear | _ConvNd) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    inputs, outputs = module.in_channels, module.out_channels
    first, second = (inputs, outputs) if isinstance(module, _ConvTransposeNd) else (outputs, inputs)
    return (first, second // module.groups, *module.kernel_size)

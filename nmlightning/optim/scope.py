"""Selects the parameters that a rule works on, with the reason for each that it leaves."""

import warnings
from collections.abc import Container, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.name_patterns import matches, some, unmatched
from nmlightning.optim.families import group_numbers
from nmlightning.optim.parameters import Model, NamedWeights, SteeredWeight
from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
from nmlightning.weights.shards import is_flat

CONVOLUTIONS, MATRICES = 3, 2
"""What a rule steers where nothing is included by name: the fewest dimensions of a weight."""
_DEFAULTS = {
    CONVOLUTIONS: ("convolutions", "not a convolution; name it by include"),
    MATRICES: ("weights of two or more dimensions", "it has fewer than two dimensions"),
}


def choose_weights(
    optimizer: Optimizer,
    model: Model,
    include: Sequence[str],
    exclude: Sequence[str],
    layouts: Mapping[str, ChannelLayout] | None = None,
    recorded: Container[str] | None = None,
    least_dims: int = CONVOLUTIONS,
) -> list[SteeredWeight]:
    """Return the weights of `optimizer` to steer, under their plain names.

    Args:
        optimizer: parameters that it does not have are left out.
        model: the model, or its named parameters.
        include: glob patterns on plain names; empty means every weight of `least_dims` or more. A
            convolution is a layer's weight of three; where only names and shapes are known every
            parameter of so many.
        exclude: glob patterns on names that are left alone.
        layouts: the layouts of weights whose output channels are not along dimension 0, where the
            model does not tell.
        recorded: the names that a recording has; parameters that only look like convolutions are
            left if it has others, with a warning.
        least_dims: CONVOLUTIONS or MATRICES.

    Raises:
        InputError: nothing to steer; a pattern that matches nothing; a parameter that FSDP1
            flattened, that has no channels, that is split within channels, or that decays inside
            the optimizer's step.
    """
    weights = NamedWeights.of(model, layouts)
    groups = group_numbers(optimizer)
    _check_names(weights, (*include, *exclude))
    names = [
        name
        for name in weights.parameters
        if why_left(weights, name, groups, include, exclude, least_dims) is None
    ]
    if recorded is not None and weights.layers is None and not include:
        names = _leave_unrecorded(names, recorded)
    if not names:
        held = some(name for name, q in weights.parameters.items() if q in groups)
        raise InputError(
            f"There is no weight to steer: by default these are the {_DEFAULTS[least_dims][0]} "
            f"in the optimizer; name others by include. It has {held}."
        )
    chosen = []
    for name in names:
        parameter = weights.parameters[name]
        chosen.append(
            SteeredWeight(name, parameter, optimizer, groups[parameter], weights.layout(name))
        )
        _check(chosen[-1])
    return chosen


def has_weights(
    optimizer: Optimizer,
    model: Model,
    include: Sequence[str],
    exclude: Sequence[str],
    least_dims: int = CONVOLUTIONS,
) -> bool:
    """Return whether `choose_weights` finds any weight to steer."""
    weights, groups = NamedWeights.of(model), group_numbers(optimizer)
    choice = include, exclude, least_dims
    return any(why_left(weights, name, groups, *choice) is None for name in weights.parameters)


def why_left(
    weights: NamedWeights,
    name: str,
    optimized: Container[Tensor],
    include: Sequence[str],
    exclude: Sequence[str],
    least_dims: int = CONVOLUTIONS,
) -> str | None:
    """Return in words why a parameter is not to be steered, or None if it is.

    Args:
        weights: of the model.
        name: of one of them.
        optimized: the parameters that an optimizer has.
        include: as for `choose_weights`.
        exclude: as for `choose_weights`.
        least_dims: as for `choose_weights`.
    """
    parameter = weights.parameters[name]
    if not parameter.requires_grad:
        return "it is frozen, and stays unsteered if it is trained later"
    if parameter not in optimized:
        return "no optimizer has it"
    if matches(name, exclude):
        return "exclude names it"
    if include:
        return None if matches(name, include) else "include does not name it"
    fits = weights.is_convolution(name) if least_dims == CONVOLUTIONS else parameter.dim() > 1
    return None if fits else _DEFAULTS[least_dims][1]


def _check_names(weights: NamedWeights, patterns: Sequence[str]) -> None:
    for name, parameter in weights.parameters.items():
        if is_flat(parameter):
            raise InputError(
                f"{name} is a flat shard of FSDP1, which has no channels: use FSDP2 "
                "(ModelParallelStrategy) or DDP."
            )
    wrong = unmatched(patterns, weights.parameters)
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no parameter. There is {some(weights.parameters)}."
        )


def _leave_unrecorded(names: list[str], recorded: Container[str]) -> list[str]:
    """Return those of the names that are recorded, or all of them if none is."""
    left = [name for name in names if name not in recorded]
    if not left or len(left) == len(names):
        return names
    warnings.warn(
        f"The recording has no {some(left)}, by its shape a convolution; it is left alone: "
        "exclude it, or give attach the model itself, which tells what is one.",
        stacklevel=4,
    )
    return [name for name in names if name in recorded]


def _check(weight: SteeredWeight) -> None:
    decay = weight.group.get("weight_decay")
    if decay:
        raise InputError(
            f"{weight.name} has weight decay {float(decay):g} in its optimizer, which would be "
            "steered with the step: put it into a parameter group without, for instance by "
            'parameter_groups with scope "last_layer".'
        )
    try:
        channel_norms(weight.parameter, layout=weight.layout)
    except InputError as error:
        raise InputError(f"{weight.name} cannot be steered: {error} Take it out.") from error

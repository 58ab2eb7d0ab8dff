"""Which parameters of an optimizer a rule steers, and which it must not."""

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms
from nmlightning.weights.plain_name import plain_name
from nmlightning.weights.steering.steered_weight import SteeredWeight

CONVOLUTIONS, MATRICES = 3, 2
"""What a rule steers where nothing is included by name: the fewest dimensions of a weight."""
_DEFAULTS = {
    CONVOLUTIONS: ("convolutions", "not a convolution; name it by include"),
    MATRICES: ("weights of two or more dimensions", "it has fewer than two dimensions"),
}


def choose_weights(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    include: Sequence[str],
    exclude: Sequence[str],
    layouts: Mapping[str, ChannelLayout],
    least_dims: int = CONVOLUTIONS,
) -> list[SteeredWeight]:
    """Return the weights of `optimizer` to steer, under their plain names.

    Args:
        optimizer: parameters that it does not have are left out.
        named_parameters: of the model.
        include: glob patterns on plain names; empty means every weight of `least_dims` or more.
        exclude: glob patterns on names that are left alone.
        layouts: the layouts of weights whose output channels are not along dimension 0.
        least_dims: CONVOLUTIONS or MATRICES.

    Raises:
        InputError: nothing to steer; a pattern that matches nothing; a parameter that FSDP1
            flattened, that is split within channels, or that decays inside the optimizer's step.
    """
    groups = {q: n for n, group in enumerate(optimizer.param_groups) for q in group["params"]}
    named = {plain_name(name): parameter for name, parameter in named_parameters}
    _check_patterns(named, (*include, *exclude))
    chosen = [
        SteeredWeight(name, parameter, optimizer, groups[parameter], layouts.get(name, ROWS))
        for name, parameter in named.items()
        if why_left(name, parameter, groups, include, exclude, least_dims) is None
    ]
    if not chosen:
        raise InputError(
            f"There is no weight to steer: by default these are the {_DEFAULTS[least_dims][0]} "
            "in the optimizer; name others by include. "
            f"It has {_some([n for n, q in named.items() if q in groups])}."
        )
    for weight in chosen:
        _check(weight)
    return chosen


def has_weights(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    include: Sequence[str],
    exclude: Sequence[str],
    least_dims: int = CONVOLUTIONS,
) -> bool:
    """Return whether `choose_weights` finds any weight to steer."""
    optimized = {q for group in optimizer.param_groups for q in group["params"]}
    return any(
        why_left(plain_name(name), parameter, optimized, include, exclude, least_dims) is None
        for name, parameter in named_parameters
    )


def why_left(
    name: str,
    parameter: Tensor,
    optimized: Container[Tensor],
    include: Sequence[str],
    exclude: Sequence[str],
    least_dims: int = CONVOLUTIONS,
) -> str | None:
    """Return in words why a parameter is not to be steered, or None if it is.

    Args:
        name: its plain name.
        parameter: it.
        optimized: the parameters that an optimizer has.
        include: as for `choose_weights`.
        exclude: as for `choose_weights`.
        least_dims: as for `choose_weights`.
    """
    if not parameter.requires_grad:
        return "it is frozen"
    if parameter not in optimized:
        return "no optimizer has it"
    if _matches(name, exclude):
        return "exclude names it"
    if include:
        return None if _matches(name, include) else "include does not name it"
    return None if parameter.dim() >= least_dims else _DEFAULTS[least_dims][1]


def _check_patterns(named: Mapping[str, Any], patterns: Iterable[str]) -> None:
    for name, parameter in named.items():
        if getattr(parameter, "_is_flat_param", False):
            raise InputError(
                f"{name} is a flat shard of FSDP1, which has no channels: use FSDP2 "
                "(ModelParallelStrategy) or DDP."
            )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InputError(
                f"The pattern {pattern!r} matches no parameter. There is {_some(list(named))}."
            )


def _check(weight: SteeredWeight) -> None:
    decay = weight.group.get("weight_decay")
    if decay:
        raise InputError(
            f"{weight.name} has weight decay {float(decay):g} in its optimizer, which would be "
            "steered with the step: put it into a parameter group without, for instance by "
            'parameter_groups with scope "last_layer".'
        )
    channel_norms(weight.parameter, layout=weight.layout)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

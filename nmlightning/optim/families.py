"""Optimizer families: how weight norms and weight decay act under each."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, optim

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import equilibrium_rotation

Power = Literal["auto", 1, 2]

# The step of these follows the gradient, which falls with ‖w‖, and the angle again: ‖w‖².
_GRADIENT = (optim.SGD,)
# The step of these is the gradient divided by its own size, so that only the angle is left: ‖w‖.
_NORMALISED = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop)


def choose_power(optimizer: optim.Optimizer, power: Power | int | str) -> int:
    """Return `power`, or for "auto" that of the optimizer's family.

    The effective learning rate of a scale-invariant weight is η / ‖w‖^power: 2 for SGD, 1 where
    the gradient's size is divided out (Adam, AdamW, NAdam, RAdam, Adamax, RMSprop).

    Raises:
        InputError: another power; "auto" for another optimizer.
    """
    if power in (1, 2):
        return int(power)
    if power != "auto":
        raise InputError(f"power is 'auto', 1 or 2, got {power!r}.")
    known = known_power(optimizer)
    if known is not None:
        return known
    raise InputError(
        f"The power for {type(optimizer).__name__} is not known: give power=2 if its step is "
        "proportional to the gradient, as that of SGD, or power=1 if it does not depend on the "
        "gradient's size, as that of Adam."
    )


def known_power(optimizer: optim.Optimizer) -> int | None:
    """Return the power of the optimizer's family, or None where it is of none that is known."""
    if isinstance(optimizer, _GRADIENT):
        return 2
    return 1 if isinstance(optimizer, _NORMALISED) else None


def expected_rotation(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """Return the `equilibrium_rotation` of weights in a parameter group of `optimizer`.

    None without weight decay, where there is no equilibrium, and for optimizers of which no formula
    is known: all but SGD without dampening, and AdamW.
    """
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if not decay:
        return None
    if isinstance(optimizer, optim.SGD) and not group["dampening"]:
        return equilibrium_rotation(
            rate, decay, momentum=group["momentum"], nesterov=group["nesterov"]
        )
    if isinstance(optimizer, optim.AdamW):
        return equilibrium_rotation(rate, decay, beta1=group["betas"][0])
    return None


def group_numbers(optimizer: optim.Optimizer) -> dict[Tensor, int]:
    """Return the parameters that an optimizer has, and the parameter group of each."""
    return {q: n for n, group in enumerate(optimizer.param_groups) for q in group["params"]}

"""By which power of a weight's norm its learning rate falls, for each family of optimizers."""

from typing import Literal

from torch import optim

from nmlightning.errors import InputError

Power = Literal["auto", 1, 2]

# The step of these follows the gradient, which falls with ‖w‖, and the angle again: ‖w‖².
_GRADIENT = (optim.SGD,)
# The step of these is the gradient divided by its own size, so that only the angle is left: ‖w‖.
_NORMALISED = (
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.RMSprop,
)


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
    if isinstance(optimizer, _GRADIENT):
        return 2
    if isinstance(optimizer, _NORMALISED):
        return 1
    raise InputError(
        f"The power for {type(optimizer).__name__} is not known: give power=2 if its step is "
        "proportional to the gradient, as that of SGD, or power=1 if it does not depend on the "
        "gradient's size, as that of Adam."
    )

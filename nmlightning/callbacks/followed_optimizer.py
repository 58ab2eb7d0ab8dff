"""Whether a run optimizes as the recorded run did that it follows."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.name_patterns import some
from nmlightning.weights.history import NormHistory


def check_same_optimizer(
    history: NormHistory, names: Sequence[str], optimizers: Sequence[Optimizer]
) -> None:
    """Compare optimizers, learning rates and decays with those of a recording, where it has them.

    A warning tells of another learning rate, and of a recording without weight decay.

    Args:
        history: the recording.
        names: of the weights that follow it.
        optimizers: that have these weights.

    Raises:
        InputError: an optimizer of a class that the recorded run did not have.
    """
    recorded = history.provenance.get("optimizers") or []
    for optimizer in optimizers:
        _check_class(recorded, optimizer)
        _compare_rates(recorded, optimizer)
    columns = [list(history.norms).index(name) for name in names]
    decays = history.weight_decays[:, columns]
    if decays.size and not np.isnan(decays).any() and not decays.any():
        _warn(f"without weight decay on {some(names, 3)}, so there is none to replace")


def _check_class(recorded: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    there, here = [each.get("name") for each in recorded], type(optimizer).__name__
    if there and here not in there:
        raise InputError(
            f"The recording is of a run with {' and '.join(map(str, there))}, and this one has "
            f"{here}, whose steps follow norms otherwise; set other_run to follow it all the same."
        )


def _compare_rates(recorded: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    name, here = type(optimizer).__name__, float(optimizer.defaults["lr"])
    there = [each["lr"] for each in recorded if each.get("name") == name and "lr" in each]
    if there and here not in there:
        _warn(f"with learning rate {there[0]:g}, and this one has {here:g}")


def _warn(difference: str) -> None:
    warnings.warn(
        f"The recording is of a run {difference}; set other_run if that is meant.", stacklevel=2
    )

"""The arrays of a history of weight norms, from anything, and what is wrong with them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nmlightning.errors import InputError


def make_arrays(
    norms: Mapping[str, ArrayLike],
    steps: ArrayLike,
    epochs: ArrayLike,
    learning_rates: ArrayLike | None = None,
    weight_decays: ArrayLike | None = None,
    *,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a `NormHistory`; rates that are None are unknown.

    Raises:
        InputError: what is no number, no whole number or no plain data; shapes that do not fit
            together; a clock that runs backwards; a negative norm.
    """
    if not isinstance(norms, Mapping):
        kind = type(norms).__name__
        raise InputError(f"norms is a mapping from names of weights to arrays, got a {kind}")
    strange = next((name for name in norms if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError(f"norms has the name {strange!r}, which is no string")
    if not isinstance(provenance, Mapping) or not _is_plain(dict(provenance)):
        raise InputError(f"provenance is a mapping of plain data, got {repr(provenance)[:60]}")
    arrays = {name: _numbers(name, values).astype(np.float32) for name, values in norms.items()}
    clock = {"steps": _whole_numbers("steps", steps), "epochs": _whole_numbers("epochs", epochs)}
    shape = (len(clock["steps"]), len(norms))
    rates = {
        "learning_rates": _rates("learning_rates", learning_rates, shape),
        "weight_decays": _rates("weight_decays", weight_decays, shape),
    }
    problem = next(_problems(arrays, clock["steps"], clock["epochs"], rates), None)
    if problem:
        raise InputError(problem)
    return {"norms": arrays, **clock, **rates, "provenance": dict(provenance)}


def check_finite(norms: Mapping[str, NDArray[np.float32]], epochs: NDArray[np.int64]) -> None:
    """Raise InputError for norms that are NaN or infinite."""
    for name, values in norms.items():
        bad = ~np.isfinite(values)
        if bad.any():
            record = int(bad.any(1).argmax())
            raise InputError(
                f"the norms of {name} are not finite from record {record} (epoch "
                f"{epochs[record]}) on, so the run it is of diverged"
            )


def _numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{name} holds no array of numbers")
    return array


def _whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = _numbers(name, values)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}, expected (records,)")
    broken = array[~(np.isfinite(array) & (array == np.floor(array)))]
    if len(broken):
        raise InputError(f"{name} are whole numbers, got {broken[0]:g}")
    return array.astype(np.int64)


def _rates(name: str, values: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.float64]:
    if values is None:
        return np.full(shape, np.nan)
    rates: NDArray[np.float64] = _numbers(name, values).astype(np.float64)
    return rates


def _is_plain(data: Any) -> bool:
    try:
        json.dumps(data)
    except (TypeError, ValueError):
        return False
    return True


def _problems(
    norms: Mapping[str, NDArray[np.float32]],
    steps: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rates: Mapping[str, NDArray[np.float64]],
) -> Iterator[str]:
    """Yield what is wrong with the shapes and the clock."""
    records = len(steps)
    if len(epochs) != records:
        yield f"{records} steps, but epochs of shape {epochs.shape}"
        return
    for name, rate in rates.items():
        if rate.shape != (records, len(norms)):
            yield f"{name} has shape {rate.shape}, expected {(records, len(norms))}"
    for name, values in norms.items():
        if values.ndim != 2 or values.shape[0] != records:
            yield f"{name} has shape {values.shape}, expected ({records}, channels)"
        elif (values < 0).any():
            yield f"{name} has a negative norm in record {int((values < 0).any(1).argmax())}"
    if (np.diff(steps) <= 0).any() or (steps < 0).any():
        yield "its steps do not increase"
    if (np.diff(epochs) < 0).any() or (epochs < 0).any():
        yield "its epochs run backwards"

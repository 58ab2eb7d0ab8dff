"""The settings of a weight norm, checked and in one spelling."""

import math
from dataclasses import dataclass
from typing import Literal

from nmlightning.errors import InputError, check_choice, check_flag, is_number

Kind = Literal["weight", "bounded"]
Gain = Literal["none", "layer", "channel"]

NAMES = {1.0: "L1", 2.0: "L2", math.inf: "L∞"}
_GAINS: dict[Kind, tuple[Gain, ...]] = {
    "bounded": ("none", "channel"),
    "weight": ("channel", "layer"),
}


@dataclass(frozen=True)
class Settings:
    """What `apply_weight_norm` takes; `rho` is None for "init".

    Raises:
        InputError: from `of`, for what is not allowed.
    """

    kind: Kind
    p: float
    rho: float | None
    gain: Gain
    project: bool

    @classmethod
    def of(
        cls,
        kind: Kind = "bounded",
        p: float | str = 2,
        rho: float | str = "init",
        gain: Gain | None = None,
        project: bool = False,
    ) -> "Settings":
        """Return them checked, with the gain that the kind has by default."""
        check_choice("kind", kind, _GAINS)
        if gain is None:
            gain = "none" if kind == "bounded" else "channel"
        check_choice(f"gain of {kind!r}", gain, _GAINS[kind])
        return cls(kind, _check_p(p), _check_rho(rho), gain, check_flag("project", project))


def _check_p(p: float | str) -> float:
    try:
        number = float(p)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(p, bool) or number not in NAMES:
        raise InputError(f"p is 1, 2 or inf, got {p!r}.")
    return number


def _check_rho(rho: float | str) -> float | None:
    if rho == "init":
        return None
    if not is_number(rho) or not 0 < float(rho) < math.inf:
        raise InputError(f"rho is 'init' or a positive number, got {rho!r}.")
    return float(rho)

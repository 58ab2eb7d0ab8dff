"""Which weights the loss does not feel the norm of: measured, on the first gradient."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.steering.steered_weight import SteeredWeight

TOLERANCE = 0.1
"""Of random directions in D dimensions the cosine is about 1/√D: a tenth of it passes for zero."""


def radial_share(weight: SteeredWeight, values: Tensor, grad: Tensor) -> Tensor:
    """Return the root mean square over channels of cos(w_i, g_i) · √D.

    It is 0 where the loss does not depend on ‖w_i‖, since then <g_i, w_i> = 0, and about 1 for a
    gradient of random direction. NaN for a gradient that is zero or not finite.

    Args:
        weight: whose channels these are.
        values: w, as of when the gradient was taken.
        grad: g, of the same shape, at any scale.
    """
    dtype = weight.norms_dtype
    rows, grads = (weight.layout.rows(x).flatten(1).to(dtype) for x in (values, grad))
    norms, sizes = (channel_norms(x, layout=weight.layout) for x in (values, grad.to(dtype)))
    cosines = (rows * (grads / sizes[:, None])).sum(1) / norms
    used = (sizes > 0) & (norms > 0)
    squares = weight.all_channels(cosines.square().where(used, 0.0))
    count = weight.all_channels(used.to(dtype)).sum()
    share: Tensor = (squares.sum() / count).sqrt() * math.sqrt(rows.shape[1])
    return share


class Scope:
    """Which weights are steered: those whose first gradient does not point along them.

    Args:
        insists: steer the others too, for they were named; a warning is due.

    Attributes:
        shares: `radial_share` of each weight, once it is known.
    """

    def __init__(self, *, insists: bool) -> None:
        self.insists = insists
        self.shares: dict[str, float] = {}

    def measure(self, weight: SteeredWeight, values: Tensor) -> None:
        """Take the share of a weight at its first usable gradient, which was taken at `values`."""
        if weight.name not in self.shares and weight.gradient is not None:
            share = float(radial_share(weight, values, weight.gradient))
            if math.isfinite(share):
                self._note(weight.name, share)

    def knows(self, weight: SteeredWeight) -> bool:
        """Return whether the share of a weight is known."""
        return weight.name in self.shares

    def holds(self, weight: SteeredWeight) -> bool:
        """Return whether the weight is steered."""
        return self.insists or self.shares.get(weight.name, 0.0) <= TOLERANCE

    def dropped(self) -> dict[str, float]:
        """Return the shares of the weights that are not steered, for the loss feels their norm."""
        if self.insists:
            return {}
        return {name: share for name, share in self.shares.items() if share > TOLERANCE}

    def reason(self, name: str) -> str:
        """Return in words what was decided about a weight."""
        if name not in self.shares:
            return "steered; it has had no gradient yet"
        share = self.shares[name]
        if share <= TOLERANCE:
            return f"steered: scale-invariant (radial share {share:.1e})"
        verdict = "steered, as include asks for" if self.insists else "left"
        return f"{verdict}: the loss feels its norm (radial share {share:.1e})"

    def _note(self, name: str, share: float) -> None:
        self.shares[name] = share
        if share > TOLERANCE and self.insists:
            warnings.warn(
                f"{name} is steered, but the loss feels its norm (is there no norm layer after "
                "it?), so its learning rate does not depend on the norm alone; take it out of "
                "include.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"shares": dict(self.shares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it for measured."""
        self.shares = dict(state["shares"])


class WholeScope(Scope):
    """Every weight is steered, whether or not the loss feels its norm; nothing is measured."""

    def __init__(self) -> None:
        super().__init__(insists=True)

    def measure(self, weight: SteeredWeight, values: Tensor) -> None:
        """Do nothing."""

    def knows(self, weight: SteeredWeight) -> bool:
        """Return True."""
        return True

    def reason(self, name: str) -> str:
        """Return in words that it is steered."""
        return "steered"

"""Detects scale-invariant weights: |⟨g, w⟩| ≤ tol·‖g‖‖w‖ on the first gradients."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nmlightning.optim.parameters import SteeredWeight
from nmlightning.weights.channel_norms import channel_norms

TOLERANCE = 0.1
"""Of random directions in D dimensions the cosine is about 1/√D: a tenth of it passes for zero."""


CHANCE = 1e-5
"""How probable it may be that gradients of random direction pass for zero."""


def radial_squares(weight: SteeredWeight, values: Tensor, grad: Tensor) -> Tensor:
    """Return the sum over channels of (cos(w_i, g_i) · √D)², and how many channels it is over.

    The terms are 0 where the loss does not depend on ‖w_i‖, since then <g_i, w_i> = 0, and about 1
    for a gradient of random direction. Channels without a gradient are left out.

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
    count = weight.all_channels(used.to(dtype))
    return torch.stack([squares.sum() * rows.shape[1], count.sum()])


def share_limit(samples: int) -> float:
    """Return the largest radial share that passes for zero, given that many channels' gradients.

    Of n random directions n · share² is χ² distributed with n degrees of freedom, so that

        P(share ≤ s) ≤ (n s² / 2)^(n/2) / Γ(n/2 + 1),

    which is `CHANCE` at what is returned; from six samples on it is `TOLERANCE`.
    """
    half = samples / 2
    square = math.exp((math.log(CHANCE) + math.lgamma(half + 1)) / half) / half
    return min(TOLERANCE, math.sqrt(square))


class Scope:
    """Which weights are steered: those whose first gradients do not point along them.

    The radial share, the root mean square of cos(w_i, g_i) · √D over channels and steps, decides as
    soon as it can: for most weights at the first step, and for one of few channels after several
    where it is small, yet may be so by chance. Until then the weight is left.

    Args:
        insists: steer the others too, for they were named; a warning is due.

    Attributes:
        shares: the radial share of each weight that has had a gradient.
        samples: how many channels' gradients it is of.
    """

    def __init__(self, *, insists: bool) -> None:
        self.insists = insists
        self.shares: dict[str, float] = {}
        self.samples: dict[str, int] = {}
        self._pending: dict[str, tuple[float, float]] = {}

    def measure(self, weight: SteeredWeight, values: Tensor) -> None:
        """Measure the gradient of the next step, which was taken at `values`; the last call counts.

        Nothing is measured any more once it is decided.
        """
        self._pending.pop(weight.name, None)
        if not self.decided(weight.name) and weight.gradient is not None:
            squares, count = radial_squares(weight, values, weight.gradient).tolist()
            if count and math.isfinite(squares):
                self._pending[weight.name] = squares, count

    def take(self, weight: SteeredWeight, values: Tensor) -> None:
        """Count the gradient of a step that was taken, which is measured now if it was not."""
        if weight.name not in self._pending:
            self.measure(weight, values)
        squares, count = self._pending.pop(weight.name, (0.0, 0.0))
        if count:
            self._add(weight.name, squares, int(count))

    def decided(self, name: str) -> bool:
        """Return whether it is known if the loss feels the norm of a weight."""
        return name in self.shares and (self._felt(name) or self._passes(name))

    def holds(self, weight: SteeredWeight) -> bool:
        """Return whether the weight is steered."""
        return self.insists or weight.name not in self.shares or self._passes(weight.name)

    def dropped(self) -> dict[str, float]:
        """Return the shares of the weights that are not steered, for the loss feels their norm."""
        if self.insists:
            return {}
        return {name: share for name, share in self.shares.items() if self._felt(name)}

    def reason(self, name: str) -> str:
        """Return in words what was decided about a weight."""
        if name not in self.shares:
            return "steered; it has had no gradient yet"
        share = f"{self.shares[name]:.1e}"
        if self._passes(name):
            return f"steered: scale-invariant (radial share {share})"
        verdict = "steered, as include asks for" if self.insists else "left"
        if self._felt(name):
            return f"{verdict}: the loss feels its norm (radial share {share})"
        few = f"in {self.samples[name]} channels' gradients may be chance"
        return f"{verdict}{'' if self.insists else ' so far'}: a radial share of {share} {few}"

    def _felt(self, name: str) -> bool:
        return self.shares[name] > TOLERANCE

    def _passes(self, name: str) -> bool:
        return self.shares[name] <= share_limit(self.samples[name])

    def _add(self, name: str, squares: float, count: int) -> None:
        before = self.samples.get(name, 0)
        total = self.shares.get(name, 0.0) ** 2 * before + squares
        self.samples[name] = before + count
        self.shares[name] = math.sqrt(total / self.samples[name])
        if self.insists and self._felt(name):
            warnings.warn(
                f"{name} is steered, but the loss feels its norm (is there no norm layer after "
                "it?), so its learning rate does not depend on the norm alone; take it out of "
                "include.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured."""
        return {"shares": dict(self.shares), "samples": dict(self.samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it for measured."""
        self.shares, self.samples = dict(state["shares"]), dict(state["samples"])


class WholeScope(Scope):
    """Every weight is steered, whether or not the loss feels its norm; nothing is measured."""

    def __init__(self) -> None:
        super().__init__(insists=True)

    def measure(self, weight: SteeredWeight, values: Tensor) -> None:
        """Do nothing."""

    def take(self, weight: SteeredWeight, values: Tensor) -> None:
        """Do nothing."""

    def decided(self, name: str) -> bool:
        """Return True."""
        return True

    def reason(self, name: str) -> str:
        """Return in words that it is steered."""
        return "steered"

"""DecayEquivalentLR: weight decay as a learning rate that grows exponentially."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ChannelLayout
from nmlightning.weights.steering.attachment import Attachment
from nmlightning.weights.steering.choose_weights import choose_weights
from nmlightning.weights.steering.moves import scale_step
from nmlightning.weights.steering.reference import Moment
from nmlightning.weights.steering.scale_invariance import Scope
from nmlightning.weights.steering.steered_weight import SteeredWeight

_RESCALE = 2.0**-4
"""Weights are scaled by this once they have outgrown it: a power of two, so nothing is rounded."""


@dataclass(frozen=True)
class DecayRate:
    """What weight decay λ does to a scale-invariant weight at learning rate η and momentum m.

    α is the larger root of z² − (1 + m − ηλ) z + m = 0, and the step without decay that turns the
    direction alike has the rate η / (α a²) for a weight that is 1/a of the decayed one.

    Attributes:
        alpha: α, by which the decayed weight shrinks per step if no gradient acts.
        pull: κ = (1 − α) / (ηα), the share of the weight that its momentum buffer carries; at
            η = 0 its limit λ / (1 − m).
    """

    alpha: float
    pull: float

    @classmethod
    def of(cls, rate: float, decay: float, momentum: float) -> "DecayRate":
        """Return it for η = `rate`; InputError where no real α exists: ηλ > (1 − √m)²."""
        product = rate * decay
        if product > (1 - math.sqrt(momentum)) ** 2:
            raise InputError(
                f"weight decay {decay:g} at learning rate {rate:g} and momentum {momentum:g} makes "
                f"the weights oscillate: their product {product:g} must be at most (1 - √m)² = "
                f"{(1 - math.sqrt(momentum)) ** 2:g}."
            )
        # 1 − α is the smaller root of δ² − (1 − m + ηλ) δ + ηλ = 0; as a quotient nothing cancels.
        middle = 1 - momentum + product
        divisor = middle + math.sqrt(max(middle**2 - 4 * product, 0.0))
        alpha = 1 - 2 * product / divisor
        return cls(alpha, 2 * decay / (divisor * alpha))


class DecayEquivalentLR:
    """Move scale-invariant weights without weight decay as SGD with weight decay λ moves them.

    SGD with momentum m, decay λ and rate η turns the directions of scale-invariant weights exactly
    as SGD without decay does whose rate at step t is η · α^(−2t−1), if its first momentum buffer is
    −(1 − α) w / (ηα) and each change of η corrects the buffer; α is that of `DecayRate`. The
    weights grow like α^(−t), and are scaled down by a power of two when they have grown 16-fold.

    Args:
        weight_decay: λ of what is steered. The optimizer must not decay these weights; the other
            parameters keep their decay in it.
        include: glob patterns on weight names; empty means every convolution that is
            scale-invariant in fact.
        exclude: glob patterns on weight names that are left alone.

    Raises:
        InputError: λ is negative. In `attach`: an optimizer other than SGD, or one with Nesterov
            momentum, dampening or maximize; no weight to steer. In a step: ηλ > (1 − √m)².

    Source: Li & Arora 2020 (arXiv 1910.07454), theorem 2.
    """

    def __init__(
        self, weight_decay: float, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay must be 0 or more, got {weight_decay!r}.")
        self.weight_decay = weight_decay
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def attach(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        layouts: Mapping[str, ChannelLayout] | None = None,
    ) -> Attachment:
        """Steer every step of `optimizer` from now on; see `LRCorrection.attach`."""
        weights = choose_weights(
            optimizer, named_parameters, self.include, self.exclude, layouts or {}
        )
        for weight in weights:
            _check_heavy_ball(weight)
            DecayRate.of(weight.learning_rate, self.weight_decay, weight.group["momentum"])
        rules = [_DecayedWeight(weight, self.weight_decay) for weight in weights]
        return Attachment(optimizer, rules, Scope(insists=bool(self.include)), type(self).__name__)


class _DecayedWeight:
    """The rule for one weight u, which is 1/a of the decayed weight that it stands for."""

    def __init__(self, weight: SteeredWeight, weight_decay: float) -> None:
        self.weight = weight
        self._weight_decay = weight_decay
        self._scale = 1.0  # a
        self._pull = 0.0  # κ of the last step; 0 before the first, when the buffer is empty
        self.factors: Tensor | None = None

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        del moment
        rate, momentum = self.weight.learning_rate, float(self.weight.group["momentum"])
        now = DecayRate.of(rate, self._weight_decay, momentum)
        self._correct_buffer(before, momentum * self._scale**2 * (self._pull - now.pull), rate)
        factor = 1 / (now.alpha * self._scale**2)
        factors = torch.full_like(self.weight.norms(), factor)
        undone, self.factors = scale_step(self.weight, before, factors)
        self._scale *= now.alpha
        self._pull = now.pull
        if self._scale < _RESCALE:
            self.weight.scale(torch.full_like(factors, _RESCALE))
            self._scale /= _RESCALE
        return undone

    def _correct_buffer(self, before: Tensor, share: float, rate: float) -> None:
        """Let the step have been taken with `share` of the weight added to its momentum."""
        buffer = self.weight.buffer("momentum_buffer")
        if buffer is not None and share:
            buffer.add_(before, alpha=share)
            self.weight.values.sub_(before, alpha=rate * share)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self._scale, "pull": self._pull}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scale, self._pull = state["scale"], state["pull"]


def _check_heavy_ball(weight: SteeredWeight) -> None:
    group = weight.group
    if not isinstance(weight.optimizer, SGD):
        raise InputError(
            f"DecayEquivalentLR is exact for SGD only, got {type(weight.optimizer).__name__}."
        )
    for option in ("nesterov", "dampening", "maximize"):
        if group[option]:
            raise InputError(
                f"DecayEquivalentLR needs SGD with plain momentum, got {option}={group[option]}."
            )

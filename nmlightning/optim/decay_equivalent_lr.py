"""DecayEquivalentLR: weight decay as a learning rate that grows exponentially."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD

from nmlightning.errors import InputError, check_weight_decay
from nmlightning.optim.parameters import OptimizedWeight, State, maybe_any, project, scale_step
from nmlightning.optim.step_hooks import StepRule


@dataclass(frozen=True)
class DecayRate:
    """The effect of weight decay λ on a scale-invariant weight at learning rate η and momentum m.

    α is the larger root of z² − (1 + m − ηλ) z + m = 0, and the step without decay that turns the
    direction alike has the rate η / (α a²) for a weight that is 1/a of the decayed one.
    """

    alpha: float  # by which the decayed weight shrinks per step if no gradient acts
    # κ = (1 − α) / (ηα), the share of the weight that its momentum buffer carries; at η = 0 its
    # limit λ / (1 − m).
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


class DecayEquivalentLR(StepRule):
    """Move scale-invariant weights without weight decay as SGD with weight decay λ moves them.

    SGD with momentum m, decay λ and rate η turns the directions of scale-invariant weights exactly
    as SGD without decay does whose rate at step t is η · α^(−2t−1), if its first momentum buffer is
    −(1 − α) w / (ηα) and each change of η corrects the buffer; α is that of `DecayRate`. The
    weights would grow like α^(−t), faster than running statistics of a batch norm follow. So each
    channel is scaled back to the norm it had at first after every step, and the rate follows it:

        Δw_i ← Δw_i / (α a_i²),        then   w_i ← w_i · ‖w_i(0)‖ / ‖w_i‖

    where a_i ‖w_i(0)‖ is the norm that the channel would have with weight decay.

    Args:
        weight_decay: λ of what is steered. The optimizer must not decay these weights; the other
            parameters keep their decay in it.
        include: glob patterns on weight names; empty means every convolution that is
            scale-invariant by its gradients.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: λ is negative. In `attach`: an optimizer other than SGD, or one with Nesterov
            momentum, dampening or maximize; no weight to steer. In a step: ηλ > (1 − √m)².

    Source: Li & Arora 2020 (arXiv 1910.07454), theorem 2.
    """

    def __init__(
        self, weight_decay: float, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        check_weight_decay(weight_decay)
        super().__init__(include, exclude)
        self.weight_decay = weight_decay

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return ‖w_i(0)‖, a_i, and the κ of the last step, 0 while the buffer is empty."""
        if not isinstance(weight.optimizer, SGD):
            raise InputError(
                f"DecayEquivalentLR is exact for SGD only, got {type(weight.optimizer).__name__}."
            )
        for option in ("nesterov", "dampening", "maximize"):
            if value := weight.group[option]:
                raise InputError(
                    f"DecayEquivalentLR needs SGD with plain momentum, got {option}={value}."
                )
        DecayRate.of(weight.learning_rate, self.weight_decay, weight.group["momentum"])
        initial = weight.norms()
        scales = torch.ones_like(initial, dtype=torch.float64)
        return {"initial": initial, "scales": scales, "pull": 0.0}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor] | None:
        """Scale the step of weight u, of which a_i u_i is the decayed one, then project."""
        if weight.gradient is None:  # SGD leaves the weight and its decay out
            return None
        rate, momentum = weight.learning_rate, float(weight.group["momentum"])
        now = DecayRate.of(rate, self.weight_decay, momentum)
        squares, buffer = state["scales"].square(), weight.buffer("momentum_buffer")
        if buffer is not None and state["pull"] != now.pull:  # as if it had been other before
            shares = momentum * (state["pull"] - now.pull) * squares
            added = before * weight.spread(shares)
            buffer.add_(added)
            weight.values.sub_(added, alpha=rate)
        factors = (1 / (now.alpha * squares)).to(state["initial"].dtype)
        skipped, factors = scale_step(weight, before, factors)
        shrunk = now.alpha / project(weight, state["initial"])
        if buffer is not None and maybe_any(skipped):  # what stands for none in the decayed run
            lost = (weight.spread(skipped) != 0) & ~buffer.isfinite()
            buffer.copy_(buffer.where(~lost, -before * weight.spread(now.pull * squares)))
        state["scales"] *= shrunk.where(~skipped, 1.0)
        state["pull"] = now.pull
        return skipped, factors

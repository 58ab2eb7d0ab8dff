"""Hyperball: around any optimizer, weights of a fixed norm that take steps of a fixed norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nmlightning.errors import InputError, check_choice
from nmlightning.optim.parameters import (
    GRANULARITIES,
    Granularity,
    OptimizedWeight,
    State,
    scale_step,
)
from nmlightning.optim.scope import MATRICES
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import is_usable


class Hyperball(StepRule):
    """Hold each weight at the norm it starts with, and let the learning rate alone turn it.

    With R = ‖W(0)‖ at attach, u the direction that the optimizer steps in and η its learning rate,

        W ← R · N(W − η R · N(u)),        N(a) = a / ‖a‖

    where ‖·‖ is the Frobenius norm of the whole weight, of all its output channels together. So the
    learning rate is the length of a step relative to the weight, about the angle in radians that
    it turns; the authors start from √(ηλ) of the run with weight decay λ that is replaced. The
    optimizer's averages do not change.

    A parameter (E, out, in) that stacks the matrices of E experts is E weights, each with its norm
    and its steps. One of three dimensions counts as a stack if its name has "expert" in it, and as
    one weight if it is that of a layer of the model, as of nn.Conv1d; what is neither is refused.

    u is the difference that the step made to the weight. It must not round to nothing: keep the
    weights in float32, as mixed precision does. A step that is not finite is skipped for the whole
    weight. Schedule-free optimizers are refused, as by every rule that changes weights: the
    parameter is a mix y of the iterate z that steps and its average x, which evaluation reads. With
    y held x had 0.46 to 3 times its first norm and z up to 37 times after 300 steps.

    Args:
        granularity: for parameters of three dimensions "matrix", a stack, but for weights of
            layers; "weight", none; or "auto", by name.
        include: glob patterns on weight names; empty means every weight of two or more dimensions,
            scale-invariant or not. The authors do not steer embeddings: name them in `exclude`.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: another granularity. In `attach`, a weight that is zero or not finite at first,
            or may be a stack; no weight to steer; weight decay in its parameter group; LBFGS.

    Source: Wen et al. 2026 (arXiv 2606.16899).

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.75)
        >>> handle = Hyperball().attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[8.0, -6.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[0., 5.]])
    """

    least_dims, single_steps = MATRICES, True
    granularity: Granularity = "auto"  # of an object that an older release wrote

    def __init__(
        self,
        *,
        granularity: Granularity = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        check_choice("granularity", granularity, GRANULARITIES)
        super().__init__(include, exclude)
        self.granularity = granularity

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return the radius R, or (E,) those of a stack."""
        _ = weight.learning_rate  # has it any?
        radius = self._norm(weight, weight.values)
        known = weight.all_channels(radius) if radius.dim() else radius
        for norm in known.view(-1)[~is_usable(known.view(-1))].tolist():
            raise InputError(
                f"{weight.name} has norm {norm:g}, which Hyperball cannot hold: initialise it "
                "otherwise, or name it in exclude."
            )
        return {"radius": radius}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Give the step its length, then the weight its norm."""
        values, radius = weight.values, state["radius"]
        length = self._norm(weight, values - before)
        factor = weight.learning_rate * radius / length
        factor = factor.where(length.isfinite(), torch.nan)
        skipped, factors = scale_step(weight, before, factor.expand(len(weight.norms())))
        scale = radius / self._norm(weight, values)
        moved = (factor > 0) & factor.isfinite() & scale.isfinite()
        scale = scale.where(moved, 1.0)
        values.copy_(values.to(scale.dtype) * (weight.spread(scale) if scale.dim() else scale))
        return skipped, factors

    def _norm(self, weight: OptimizedWeight, values: Tensor) -> Tensor:
        """Return ‖·‖ over the channels of all ranks, or (E,) of this rank's matrices of a stack."""
        stack = weight.is_stack(self.granularity)
        return weight.norms(values) if stack else weight.whole_norm(values)

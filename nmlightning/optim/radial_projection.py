"""RadialProjection: take out of a step what only makes a scale-invariant weight longer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmlightning.errors import InputError, is_number
from nmlightning.optim.parameters import STEP, OptimizedWeight, State, take_step
from nmlightning.optim.scope import MATRICES
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import channel_norms, unit_rows


class RadialProjection(StepRule):
    """Remove the radial part of each step, as SGDP and AdamP do around SGD and Adam.

    If the gradient g is nearly orthogonal to every output channel w_i of d elements, the weight
    counts as scale-invariant by channels; if only to the whole weight W of D elements, as a whole;
    otherwise its step does not change:

        |cos(w_i, g_i)| < δ/√d for all i:   Δw_i ← Δw_i − (ŵ_i · Δw_i) ŵ_i,    ŵ_i = w_i / ‖w_i‖
        else |cos(W, g)| < δ/√D:            ΔW ← ΔW − (Ŵ · ΔW) Ŵ,              Ŵ = W / ‖W‖

    w and g are those before the step; a gradient of zero is orthogonal to any weight. The
    optimizer's averages do not change. The factors of a dashboard are the remaining shares of the
    length of each channel's step. A channel whose step is not finite goes back to where it was.

    The authors' optimizers decay projected weights by a tenth. A hook cannot take the decay out
    of the step, so weight decay is refused, as with the other rules.

    Args:
        delta: δ > 0; infinity projects the channels of every weight.
        include: glob patterns on weight names; empty means every weight of two or more dimensions,
            as in the authors' code.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: δ is not positive. In `attach`: no weight to steer; weight decay in its
            parameter group; LBFGS.

    Source: Heo et al. 2021, algorithms 1 and 2 (arXiv 2006.08217).

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = RadialProjection().attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[0.05, 1.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 3., -1.]])
    """

    least_dims, acts_on, single_steps = MATRICES, STEP, True

    def __init__(
        self, *, delta: float = 0.1, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if not (is_number(delta) and delta > 0):
            raise InputError(f"delta must be positive, got {delta!r}.")
        super().__init__(include, exclude)
        self.delta = delta

    def init_state(self, weight: OptimizedWeight) -> State:
        return {}

    def measure_gradient(self, weight: OptimizedWeight) -> State:
        """Return (C,) cos(w_i, g_i) and ‖g_i‖."""
        grad, layout = weight.gradient, weight.layout
        if grad is None:
            return {}
        units, of_gradient = (unit_rows(x, layout).flatten(1) for x in (weight.values, grad))
        return {
            "cosines": (units * of_gradient).sum(1),
            "sizes": channel_norms(grad, layout=layout),
        }

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Take its radial part out of the step."""
        skipped, factors = take_step(weight, before)
        if "cosines" in state:
            lengths = channel_norms(weight.values - before, layout=weight.layout)
            shares = self._radial_shares(weight, before, state["cosines"], state["sizes"])
            weight.values.sub_(before * weight.spread(shares))
            left = channel_norms(weight.values - before, layout=weight.layout) / lengths
            factors = left.where(lengths > 0, factors)
        return skipped, factors

    def _radial_shares(
        self, weight: OptimizedWeight, before: Tensor, cosines: Tensor, sizes: Tensor
    ) -> Tensor:
        """Return (C,) c_i, for c_i w_i to be taken from the step of each channel of this rank."""
        layout, gather = weight.layout, weight.all_channels
        norms = channel_norms(before, layout=layout)
        units = unit_rows(before, layout).flatten(1)
        width = units.shape[1]
        cosines = gather(cosines.where((norms != 0) & (sizes != 0), 0.0))
        along = (units * layout.rows(weight.values - before).flatten(1)).sum(1)
        along = gather(along.where(norms != 0, 0.0))
        norms, sizes = gather(norms), gather(sizes)
        whole = (norms * cosines * sizes).sum() / (norms.norm() * sizes.norm())
        by_channel = cosines.abs().max() < self.delta / math.sqrt(width)
        by_layer = whole.abs() < self.delta / math.sqrt(width * len(norms))
        of_layer = torch.where(by_layer, (norms * along).sum() / norms.square().sum(), 0.0)
        of_channels = (along / norms).where(norms != 0, 0.0)
        return weight.local_channels(of_channels.where(by_channel, of_layer))

"""RadialProjection: take out of a step what only makes a scale-invariant weight longer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import InputError
from nmlightning.optim.parameters import SteeredWeight, scale_step
from nmlightning.optim.step_hooks import MatrixRule, StepRule
from nmlightning.weights.channel_norms import channel_norms, unit_rows
from nmlightning.weights.history import Moment


class RadialProjection(MatrixRule):
    """Remove the radial part of each step, as SGDP and AdamP do around SGD and Adam.

    Where the gradient g lies across every output channel w_i of d elements, the weight is taken
    for scale-invariant by channels; else, where g lies across the whole weight W of D elements,
    as a whole; else its step is left as it is:

        |cos(w_i, g_i)| < δ/√d for all i:   Δw_i ← Δw_i − (ŵ_i · Δw_i) ŵ_i,    ŵ_i = w_i / ‖w_i‖
        else |cos(W, g)| < δ/√D:            ΔW ← ΔW − (Ŵ · ΔW) Ŵ,              Ŵ = W / ‖W‖

    w and g are those that the step was taken at; a gradient of zero lies across any weight. The
    optimizer's averages stay as they are. The factors of a dashboard are what is left of the length
    of each channel's step. A channel whose step is not finite goes back to where it was.

    The authors' optimizers decay projected weights by a tenth. A hook cannot tell the decay from
    the rest of the step, so that weight decay is refused here as beside the other rules.

    Args:
        delta: δ > 0; infinity projects the channels of every weight.
        include: glob patterns on weight names; empty means every weight of two or more dimensions,
            as in the authors' code.
        exclude: glob patterns on weight names that are left alone.

    Raises:
        InputError: δ is not positive. In `attach`: no weight to steer; weight decay in its
            parameter group; LBFGS.

    Source: Heo et al. 2021, algorithms 1 and 2 (arXiv 2006.08217).

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> attachment = RadialProjection().attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[0.05, 1.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 3., -1.]])
    """

    def __init__(
        self, *, delta: float = 0.1, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> None:
        if not delta > 0:
            raise InputError(f"delta must be positive, got {delta!r}.")
        super().__init__(include=include, exclude=exclude)
        self.delta = delta

    def _settings(self, optimizer: Optimizer) -> dict[str, Any]:
        return {"delta": self.delta}

    def _steer(self, weight: SteeredWeight) -> StepRule:
        return _ProjectedWeight(weight, self.delta)


class _ProjectedWeight:
    """The rule for one weight."""

    def __init__(self, weight: SteeredWeight, delta: float) -> None:
        self.weight = weight
        self.factors: Tensor | None = None
        self._delta = delta

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        del moment
        weight, grad = self.weight, self.weight.gradient
        undone, self.factors = scale_step(weight, before, torch.ones_like(weight.norms()))
        if grad is not None:
            lengths = self._norms(weight.values - before)
            shares = self._radial_shares(before, grad, weight.values - before)
            weight.values.sub_(before * weight.spread(shares))
            left = self._norms(weight.values - before) / lengths
            self.factors = left.where(lengths > 0, self.factors)
        return undone

    def _norms(self, values: Tensor) -> Tensor:
        return channel_norms(values, layout=self.weight.layout)

    def _radial_shares(self, weights: Tensor, grad: Tensor, step: Tensor) -> Tensor:
        """Return (C,) c_i, for c_i w_i to be taken from the step of each channel of this rank."""
        layout, gather = self.weight.layout, self.weight.all_channels
        norms, sizes = (self._norms(x) for x in (weights, grad))
        units = unit_rows(weights, layout).flatten(1)
        width = units.shape[1]
        cosines = (units * unit_rows(grad, layout).flatten(1)).sum(1)
        cosines = gather(cosines.where((norms != 0) & (sizes != 0), 0.0))
        along = gather((units * layout.rows(step).flatten(1)).sum(1).where(norms != 0, 0.0))
        norms, sizes = gather(norms), gather(sizes)
        whole = (norms * cosines * sizes).sum() / (norms.norm() * sizes.norm())
        by_channel = cosines.abs().max() < self._delta / math.sqrt(width)
        by_layer = whole.abs() < self._delta / math.sqrt(width * len(norms))
        of_layer = torch.where(by_layer, (norms * along).sum() / norms.square().sum(), 0.0)
        of_channels = (along / norms).where(norms != 0, 0.0)
        return self.weight.local_channels(of_channels.where(by_channel, of_layer))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

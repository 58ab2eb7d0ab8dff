"""Hyperball: around any optimizer, weights of a fixed norm that take steps of a fixed norm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.optim.parameters import SteeredWeight, scale_step
from nmlightning.optim.step_hooks import MatrixRule, StepRule
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import Moment


class Hyperball(MatrixRule):
    """Hold each weight at the norm it starts with, and let the learning rate alone turn it.

    With R = ‖W(0)‖ at attach, u the direction that the optimizer steps in and η its learning rate,

        W ← R · N(W − η R · N(u)),        N(a) = a / ‖a‖

    where ‖·‖ is the Frobenius norm of the whole weight, of all its output channels together. So the
    learning rate is the length of a step relative to the weight, about the angle in radians that
    it turns; the authors start from √(ηλ) of the run with weight decay λ that is replaced. The
    optimizer's averages stay as they are.

    u is the difference that the step made to the weight. Where that rounds to nothing the weight
    stays, as it does at η = 0: keep the weights themselves in float32, as mixed precision does.
    A step that is not finite is undone for the whole weight.

    Args:
        include: glob patterns on weight names; empty means every weight of two or more dimensions,
            whether or not the loss feels its norm. The authors leave embeddings to the optimizer
            alone: name them in `exclude`.
        exclude: glob patterns on weight names that are left alone.

    Raises:
        InputError: in `attach`, a weight that is zero or not finite at first; no weight to steer;
            weight decay in its parameter group; LBFGS.

    Source: Wen et al. 2026 (arXiv 2606.16899).

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.75)
        >>> attachment = Hyperball().attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[8.0, -6.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[0., 5.]])
    """

    def _steer(self, weight: SteeredWeight) -> StepRule:
        return _SphericalWeight(weight)


class _SphericalWeight:
    """The rule for one weight."""

    def __init__(self, weight: SteeredWeight) -> None:
        self.weight = weight
        self.factors: Tensor | None = None
        self._radius = self._norm(weight.values)
        if not 0 < float(self._radius) < torch.inf:
            raise InputError(
                f"{weight.name} has norm {float(self._radius):g}, which Hyperball cannot hold: "
                "initialise it otherwise, or name it in exclude."
            )

    def after_step(self, before: Tensor, moment: Moment) -> Tensor:
        del moment
        values = self.weight.values
        length = self._norm(values - before)
        factor = self.weight.learning_rate * self._radius / length
        factor = factor.where(length.isfinite(), torch.nan)
        factors = factor.expand(len(self.weight.norms()))
        undone, self.factors = scale_step(self.weight, before, factors)
        scale = self._radius / self._norm(values)
        moved = (factor > 0) & factor.isfinite() & scale.isfinite()
        values.copy_(values.to(scale.dtype) * scale.where(moved, 1.0))
        return undone

    def _norm(self, values: Tensor) -> Tensor:
        """Return ‖·‖ over the channels of all ranks."""
        norms = channel_norms(values, layout=self.weight.layout)
        norm: Tensor = torch.linalg.vector_norm(self.weight.all_channels(norms))
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"radius": self._radius.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._radius.copy_(state["radius"])

"""Counts skipped (non-finite) steps over all ranks, and ends a run that has too many in a row."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.name_patterns import some
from nmlightning.optim.parameters import OptimizedWeight
from nmlightning.weights.channel_norms import join_parts

MAX_SKIPPED_STEPS = 100
"""A run stops when some weight's step had to be skipped in this many steps in a row."""
_CHECK_EVERY = 25  # steps: the check waits for the device, and for other ranks.


class NonfiniteSteps:
    """Counts the channels whose step a rule skipped, warns, and stops a run that goes nowhere.

    Ranks that share the channels of a weight count together, so that all of them warn and stop.
    """

    def __init__(self, weights: Sequence[OptimizedWeight], rule: str) -> None:
        self._weights = list(weights)
        self._rule = rule
        device = weights[0].values.device
        # Of each weight, on this rank; what a resumed run had counted is of all ranks.
        self._counts, self._now, self._in_a_row = torch.zeros(
            3, len(weights), dtype=torch.int64, device=device
        ).unbind()
        self._earlier = torch.zeros_like(self._counts)
        self._reported = torch.zeros_like(self._counts)
        self._reported_here = torch.zeros_like(self._counts)  # without earlier runs and other ranks

    def note(self, skipped: Sequence[Tensor | None], step: int) -> None:
        """Count the (C,) bool of each weight, the channels that skipped this step; None is none."""
        none = torch.zeros_like(self._now[0])
        counts = [none if each is None else each.sum().to(none.device) for each in skipped]
        self._now = torch.stack(counts)
        self._counts += self._now
        self._in_a_row = (self._in_a_row + 1) * (self._now > 0)
        if step % _CHECK_EVERY == 0:
            self.warn_if_skipped(step)

    def totals(self) -> Tensor:
        """Return the skipped steps of each weight's channels, on all ranks, which all call it."""
        return self._earlier + self._over_ranks(self._counts)

    def warn_if_skipped(self, step: int) -> None:
        """Warn of what was skipped since the last check, or stop; every rank has to call it."""
        totals = self.totals()
        if torch.equal(totals, self._reported):
            return
        rows = self._over_ranks(self._in_a_row, "max")
        if int(rows.max()) >= MAX_SKIPPED_STEPS:
            self._stop(rows)
        self._warn(totals - self._reported, step)
        self._reported, self._reported_here = totals.clone(), self._counts.clone()

    def warn_on_this_rank(self, step: int) -> None:
        """Warn of what this rank skipped since the last check, without asking the others."""
        self._warn(self._counts - self._reported_here, step)
        self._reported_here = self._counts.clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts over all ranks; every rank has to call it."""
        return {"counts": self.totals(), "in_a_row": self._over_ranks(self._in_a_row, "max")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts.zero_()
        self._reported_here.zero_()
        self._earlier.copy_(state["counts"])
        self._reported.copy_(state["counts"])
        self._in_a_row.copy_(state["in_a_row"])

    def _stop(self, rows: Tensor) -> None:
        worst = (rows >= MAX_SKIPPED_STEPS).tolist()
        now = self._over_ranks(self._now)
        gradients = [weight.gradient for weight in self._weights]
        nonfinite = [0 if g is None else int(not bool(g.isfinite().all())) for g in gradients]
        counts = self._over_ranks(torch.tensor(nonfinite, device=self._counts.device))
        advice = (
            "their steps or factors are not finite, so the run has diverged. Lower the learning "
            'rate, or follow a finer recording (every few steps, align="interpolate").'
        )
        if counts.any():
            advice = (
                "their gradients are not finite. Find the operation that makes them so, for "
                "instance by torch.autograd.set_detect_anomaly(True), or lower the learning rate."
            )
        raise InputError(
            f"{self._rule} had to skip the steps of {self._names(worst)} {int(rows.max())} times "
            f"in a row (now of {int(now.sum())} channels): {advice}"
        )

    def _warn(self, new: Tensor, step: int) -> None:
        names, count = self._names((new > 0).tolist()), int(new.sum())
        if count:
            warnings.warn(
                f"{self._rule} skipped {count} steps of channels of {names} by step {step}, since "
                "they, their gradients or their factors were not finite; after "
                f"{MAX_SKIPPED_STEPS} such steps in a row the run stops.",
                stacklevel=2,
            )

    def _names(self, chosen: Sequence[bool]) -> str:
        return some([w.name for w, is_it in zip(self._weights, chosen, strict=True) if is_it], 3)

    def _over_ranks(self, values: Tensor, operation: Any = "sum") -> Tensor:
        parameters = [weight.parameter for weight in self._weights]
        return torch.stack(join_parts(values.unbind(), parameters, operation))

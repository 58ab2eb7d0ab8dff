"""Bounds on weights after each step: a largest singular value, or rows or columns of unit norm."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nmlightning.errors import InputError, check_choice, is_number
from nmlightning.name_patterns import matches
from nmlightning.optim.parameters import (
    GRANULARITIES,
    Granularity,
    OptimizedWeight,
    State,
    take_step,
)
from nmlightning.optim.scope import MATRICES, Choice
from nmlightning.optim.step_hooks import StepRule
from nmlightning.weights.channel_norms import ROWS, is_usable

MOST_ITERATIONS, RISE = 50, 1e-4
"""The power iteration ends where an iteration raises its estimate by no more than this share."""
STEP_SHARE = 0.3
"""Of the step's right vector in the first one; of 0, 0.3 and 1 the one that missed σ the least."""


class SpectralCap(StepRule):
    """Keep the largest singular value of each weight at or below a bound.

    After every step, with σ the largest singular value of the weight as a matrix (out, rest),

        W ← W · min(1, σ_max / σ).

    The whole matrix is scaled, which bounds all singular values, keeps their ratios, and changes
    nothing for a scale-invariant weight; to clip σ alone would need as many passes as values are
    above the bound. The optimizer may decay the weight, and its averages do not change. A step that
    is not finite is skipped for the whole weight. Of a stack of experts (E, out, in) each matrix
    has its bound, as in `Hyperball`.

    σ is estimated by a power iteration that continues from step to step, in some 6 iterations each,
    with a wait for the device after each iteration. The estimate is never above σ, which after the
    step so is some 1 % above σ_max: of 102 runs of SGD, Adam and Muon with steps of 0.02 to twice
    the weight, mostly of random gradients, 7 % was the most, and 1.6 % where they were no longer
    than a tenth of it (24 runs).

    Args:
        sigma_max: the bound.
        granularity: of parameters of three dimensions, as of `Hyperball`.
        include: glob patterns on weight names; empty means every weight of two or more dimensions.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: a bound that is not positive; another granularity. In `attach`: as
            `StepRule.attach` says; a weight that may be a stack; LBFGS.

    Source: Gouk et al. 2021 (arXiv 1804.04368), algorithm 2; Newhouse et al. 2025 compare it with
    others on transformers (arXiv 2507.13338).

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = SpectralCap(2.0).attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])
    """

    least_dims, single_steps, decays = MATRICES, True, True

    def __init__(
        self,
        sigma_max: float,
        *,
        granularity: Granularity = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if not (is_number(sigma_max) and sigma_max > 0):
            raise InputError(f"sigma_max must be a positive number, got {sigma_max!r}.")
        check_choice("granularity", granularity, GRANULARITIES)
        super().__init__(include, exclude)
        self.sigma_max = sigma_max
        self.granularity = granularity

    def init_state(self, weight: OptimizedWeight) -> State:
        """Return the estimate of the left singular vector, (C,), or (E, out) of a stack.

        With it random numbers, which keep the rows of a step from cancelling where they are added.
        """
        stack = weight.is_stack(self.granularity)
        shape = weight.parameter.shape[:2] if stack else (weight.channels,)
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        noise = weight.local_channels(start.to(weight.norms_dtype))
        state = {"left": noise.clone(), "noise": noise}
        self._estimate(weight, state, weight.values)
        return state

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Estimate σ, and scale the weight."""
        stack = weight.is_stack(self.granularity)
        skipped, factors = take_step(weight, before, whole=not stack)
        sigma = self._estimate(weight, state, before)
        scale = (self.sigma_max / sigma).clamp(max=1.0).where(is_usable(sigma), 1.0)
        weight.values.mul_(weight.spread(scale.expand(len(skipped)).where(~skipped, 1.0)))
        return skipped, factors

    @torch.no_grad()
    def _estimate(self, weight: OptimizedWeight, state: State, before: Tensor) -> Tensor:
        """Improve the left singular vector, and return the estimates of σ, (E,), or (1,).

        Some of the step is added to the right one, lest a direction that it made the largest, to
        which the vectors are orthogonal, is never found.
        """
        left, stack = state["left"], weight.is_stack(self.granularity)
        values, step = (
            each if stack else weight.layout.rows(each).flatten(1)[None]
            for each in (weight.values.to(left.dtype), (weight.values - before).to(left.dtype))
        )
        joined = torch.clone if stack else weight.sum_over_ranks
        units, noise = (state[name].view(values.shape[:2]) for name in ("left", "noise"))
        added = STEP_SHARE * _rights(noise * step.norm(dim=2), step, joined)
        units, sigma = _iterate(units, values, added, joined)
        left.copy_(units.view_as(left))
        return sigma


Joined = Callable[[Tensor], Tensor]
"""The sum over the ranks that share the rows of a matrix."""


def _rights(lefts: Tensor, matrices: Tensor, joined: Joined) -> Tensor:
    """Return the unit vectors along lefts, (E, out), times matrices, (E, out, in)."""
    unit: Tensor = F.normalize(joined(torch.einsum("eo,eoi->ei", lefts, matrices)))
    return unit


def _iterate(units: Tensor, values: Tensor, added: Tensor, joined: Joined) -> tuple[Tensor, Tensor]:
    """Return better left singular vectors, (E, out), and the estimates of σ, (E,)."""
    sigma = values.new_zeros(len(values))
    rises = torch.ones_like(sigma, dtype=torch.bool)
    for _ in range(MOST_ITERATIONS):
        right, added = F.normalize(_rights(units, values, joined) + added), torch.zeros_like(added)
        image = torch.einsum("eoi,ei->eo", values, right)
        found = joined(image.square().sum(1)).sqrt()
        units = (image / found[:, None]).where((rises & is_usable(found))[:, None], units)
        # Each matrix ends by itself, so that it does not depend on which others are here.
        sigma, known = found.where(rises, sigma), sigma
        rises = rises & (sigma > known * (1 + RISE))
        if not bool(rises.any()):
            break
    return units, sigma


class UnitNorm(StepRule):
    """Set every row or every column of a matrix to unit norm after each step.

        w ← w / ‖w‖ · r,     r = 1, or √n of a row or column w of n elements for norm="rms"

    Rows, dim 1, are the weights of one output over all inputs, of a convolution the whole channel;
    columns, dim 0, those of one input over all outputs, for each element of a kernel. A row of
    zeros stays. A stack of experts (E, out, in) has the rows and columns of its matrices. The
    optimizer may decay the weight, which so turns by 1 / (1 − ηλ) as much, and its averages do not
    change. A row whose step is not finite goes back to where it was, and under dim 0 the whole
    matrix.

    Forced weight normalization of EDM2 is `UnitNorm(norm="rms")`, for layers that divide their
    weight by √n in forward as EDM2's do, and `UnitNorm()` for plain layers. nGPT has all vectors of
    the embedding's dimension on the sphere, which are the columns of the matrices that write into
    the residual stream: for `nmlightning.Transformer`

        UnitNorm(dim={"*.out.weight": 0, "*.outer.weight": 0, "*": 1}).

    Args:
        dim: 1, 0, or by glob patterns on weight names, of which the first that matches counts.
        norm: "l2", or "rms", under which the elements have a root mean square of 1.
        granularity: of parameters of three dimensions, as of `Hyperball`.
        include: glob patterns on weight names; empty means every weight of two or more dimensions.
        exclude: glob patterns on names of weights that are not steered.

    Raises:
        InputError: a setting outside what is allowed. In `attach`: as `StepRule.attach` says; no
            pattern of `dim` that matches a weight, or one that is the first for none; LBFGS.

    Source: Karras et al. 2024 (arXiv 2312.02696), §2.3; Loshchilov et al. 2024 (arXiv 2410.01131),
    §2.6.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 3.0]]))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = UnitNorm().attach(optimizer, [("weight", weight)])
        >>> weight.grad = torch.tensor([[0.0, -1.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[0.6000, 0.8000]])
    """

    least_dims, single_steps, decays = MATRICES, True, True

    def __init__(
        self,
        dim: int | Mapping[str, int] = 1,
        *,
        norm: Literal["l2", "rms"] = "l2",
        granularity: Granularity = "auto",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        for each in dim.values() if isinstance(dim, Mapping) else (dim,):
            check_choice("dim", each, (0, 1))
        check_choice("norm", norm, ("l2", "rms"))
        check_choice("granularity", granularity, GRANULARITIES)
        super().__init__(include, exclude)
        self.dim = dict(dim) if isinstance(dim, Mapping) else dim
        self.norm = norm
        self.granularity = granularity

    @property
    def choice(self) -> Choice:
        return super().choice._replace(sorted_by=() if isinstance(self.dim, int) else [*self.dim])

    def init_state(self, weight: OptimizedWeight) -> State:
        self._dim_of(weight)
        weight.is_stack(self.granularity)
        return {}

    def after_step(
        self, weight: OptimizedWeight, before: Tensor, recorded: Tensor | None, state: State
    ) -> tuple[Tensor, Tensor]:
        """Set the norms."""
        dim, stack, values = self._dim_of(weight), weight.is_stack(self.granularity), weight.values
        skipped, factors = take_step(weight, before, whole=dim == 0 and not stack)
        rows = weight.layout.rows(values).to(weight.norms_dtype)
        if stack:
            norms, elements = rows.norm(dim=1 + dim, keepdim=True), rows.shape[1 + dim]
        elif dim == 1:
            norms, elements = ROWS.spread(weight.norms(), rows), rows[0].numel()
        else:
            norms, elements = weight.sum_over_ranks(rows.square().sum(0)).sqrt(), weight.channels
        target = math.sqrt(elements) if self.norm == "rms" else 1.0
        rows = rows * (target / norms).where(is_usable(norms), 1.0)
        new = weight.layout.from_rows(rows, values.shape).to(values.dtype)
        values.copy_(torch.where(weight.spread(skipped) != 0, values, new))
        return skipped, factors

    def _dim_of(self, weight: OptimizedWeight) -> int:
        if isinstance(self.dim, int):
            return self.dim
        for pattern, dim in self.dim.items():
            if matches(weight.name, [pattern]):
                return dim
        raise InputError(f'dim has no pattern for {weight.name}: add "*" for all others.')

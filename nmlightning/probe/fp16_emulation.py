"""Emulates a norm in pure half precision on the inputs that a layer got.

A statistic's channel is a row here: (C, n), the n values that share a mean and a scale. Each norm
normalises the rows in float16 and in float32, both from the same float16 values and with the same
eps, and carries the same gradient back. What float16 loses before any norm, in holding x, counts
separately: no other norm brings that back.

float16 holds magnitudes up to 65504, in steps of 2⁻²⁴ below 2⁻¹⁴ and of about a 2048th above. With
σ the deviation of a channel and d = x − μ, its limits meet the textbook form of L2 twice:

- forward, d² is rounded to infinity from |d| = √65520 = 255.97 on. The variance is then infinite,
  its inverse root 0, and the channel's whole output 0, without any NaN.
- backward, autograd takes (σ² + eps)^(−3/2), which is infinite below σ = √(65520^(−2/3) − eps):
  0.0246 at eps = 1e-5. Infinity times what is 0 in float16 is NaN.

L1, L∞, Top(k) and range divide by what is as large as d itself, so for them the limits are those of
d: at most 65504, and no less than 2⁻¹⁴ = 6.1e-5 for a full mantissa.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nmlightning.kernels.interface import NormKind
from nmlightning.norms.registry import find_norm, layer_class

# What becomes of a channel; the first that holds counts.
OUTCOMES = (
    "right",
    "input",  # float16 does not hold x − μ
    "not finite",  # the output has inf or NaN
    "dead",  # the output is 0 throughout
    "wrong",  # the output is off by more than TOLERANCE
    "gradient not finite",
    "gradient wrong",
)
RIGHT, INPUT, NOT_FINITE, DEAD, WRONG, GRADIENT_NOT_FINITE, GRADIENT_WRONG = range(len(OUTCOMES))
TOLERANCE = 0.1
"""Root mean square of an error, as a part of what is right. Rounding to float16 makes about 0.001,
and what float32 makes of these sums does not count."""
_FLOOR = 0.1  # outputs smaller than this, which eps has shrunk, are judged as if they had this size
_ELEMENTS_AT_ONCE = 2**21
_WIDEST_LINE = 64


@dataclass(frozen=True)
class HalfNorm:
    """A norm in half precision, by its options, and by name and options what it should compute."""

    options: Mapping[str, Any]
    exact: tuple[str, Mapping[str, Any]]
    # How many elements of a channel its gradient singles out, where a tie in float16 is none in
    # float32: so many, twice, may differ, and all others by the same.
    picks: int = 0
    kinds: tuple[NormKind, ...] = ("batch", "layer")  # that it can replace


_IN_HALF = {"stats_dtype": torch.float16}
HALF_NORMS: Mapping[str, HalfNorm] = {
    "half_l2": HalfNorm({}, ("lp", {"p": 2.0})),
    "l1": HalfNorm(_IN_HALF, ("l1", {})),
    "linf": HalfNorm(_IN_HALF, ("linf", {}), picks=1, kinds=("batch",)),
    "top10": HalfNorm(_IN_HALF, ("top10", {}), picks=10, kinds=("batch",)),
    "range": HalfNorm(_IN_HALF, ("range", {}), picks=32, kinds=("batch",)),
}


def run_in_fp16(
    rows: Tensor, gradients: Tensor | None, eps: float, norms: Sequence[str]
) -> dict[str, Tensor]:
    """Return for each norm what would become of each channel, (C,) indices of `OUTCOMES`.

    Given are (C, n) what the layer got, and of the loss by (x − μ)/√(ŝ² + eps) the gradients, None
    to try the forward alone. Each channel's are scaled, as a loss scale would, so that they and
    what they become are as far from both ends of float16 as they can be. A norm that takes more
    than n values a channel is left out.
    """
    names = [name for name in norms if HALF_NORMS[name].picks <= rows.shape[1]]
    parts = max(1, rows.numel() // _ELEMENTS_AT_ONCE)
    chunks = rows.tensor_split(parts)
    slopes = [None] * len(chunks) if gradients is None else gradients.tensor_split(parts)
    outcomes: dict[str, list[Tensor]] = {name: [] for name in names}
    for chunk, slope in zip(chunks, slopes, strict=True):
        half = chunk.half()
        right, rounded = _normalise(chunk.float(), eps), _normalise(half.float(), eps)
        lost = ~(_rms(rounded - right) <= TOLERANCE * _rms(right).clamp(min=_FLOOR))
        for name in names:
            tried = _run_norm_in_fp16(HALF_NORMS[name], name, half, slope, eps)
            outcomes[name].append(torch.where(lost, INPUT, tried))
    return {name: torch.cat(parts) for name, parts in outcomes.items()}


def _normalise(rows: Tensor, eps: float) -> Tensor:
    deviations = rows - rows.mean(1, keepdim=True)
    return deviations / (deviations.square().mean(1, keepdim=True) + eps).sqrt()


def _run_norm_in_fp16(
    norm: HalfNorm, name: str, half: Tensor, gradients: Tensor | None, eps: float
) -> Tensor:
    exact_name, exact_options = norm.exact
    exact = _Run(exact_name, exact_options, half.float(), eps)
    tried = _Run(name, norm.options, half, eps)
    outcome = torch.full_like(half[:, 0], RIGHT, dtype=torch.uint8)
    if gradients is not None:
        _judge_gradients(outcome, exact, tried, gradients, 2 * norm.picks)
    error = _rms(tried.output.float() - exact.output)
    off = ~(error <= TOLERANCE * _rms(exact.output).clamp(min=_FLOOR))
    outcome[off] = WRONG
    outcome[off & (tried.output == 0).all(1)] = DEAD
    outcome[~tried.output.isfinite().all(1)] = NOT_FINITE
    return outcome


def _judge_gradients(
    outcome: Tensor, exact: "_Run", tried: "_Run", gradients: Tensor, ties: int
) -> None:
    """Write into `outcome` what is wrong with the gradients, where the given ones are finite."""
    known = gradients.isfinite().all(1, keepdim=True)
    wide = torch.where(known, gradients, 0.0).float()
    right = exact.gradient(wide)
    # A power of two that brings the largest of both to equal distances from 1, (C, 1).
    sizes = [tensor.abs().amax(1, keepdim=True).log2() for tensor in (wide, right)]
    scale = torch.exp2((-0.5 * (sizes[0] + sizes[1])).nan_to_num(0.0, 0.0, 0.0).round())
    got = tried.gradient((wide * scale).half()).float()
    finite = got.isfinite().all(1)
    errors = (got - right * scale).nan_to_num()
    if ties:
        errors -= errors.median(1, keepdim=True).values
        largest = errors.abs().topk(min(ties, errors.shape[1] - 1), dim=1).indices
        errors.scatter_(1, largest, 0.0)
    passed_on = _rms(wide * scale) / (exact.input.var(1, correction=0) + exact.eps).sqrt()
    outcome[_rms(errors) > TOLERANCE * passed_on] = GRADIENT_WRONG
    outcome[~finite] = GRADIENT_NOT_FINITE


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()


@dataclass
class _Run:
    """One norm of (C, n) rows, forward, and backward when asked."""

    name: str
    options: Mapping[str, Any]
    input: Tensor
    eps: float
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer = layer_class(self.name, "batch", None)(
            len(self.input),
            **find_norm(self.name).fixed,
            **self.options,
            eps=self.eps,
            affine=False,
            track_running_stats=False,
            device=self.input.device,
        )
        with torch.enable_grad():
            self.leaf = self._as_image(self.input).requires_grad_()
            self.graph = layer(self.leaf)
        self.output = self.graph.detach().reshape(self.input.shape)

    def gradient(self, of_output: Tensor) -> Tensor:
        """Return (C, n) the gradient by the input."""
        (result,) = torch.autograd.grad(self.graph, self.leaf, self._as_image(of_output))
        return result.reshape(self.input.shape)

    def _as_image(self, rows: Tensor) -> Tensor:
        """Return (C, n) rows as (1, C, n / w, w): the largest are found line by line."""
        n = rows.shape[1]
        width = min(n & -n, _WIDEST_LINE)  # a power of two that divides n
        return rows.reshape(1, len(rows), n // width, width)


LARGEST = 65504.0
SMALLEST_NORMAL = 2.0**-14
_ROUNDED_TO_INFINITY = 65520.0  # half a step above the largest
OF_SQUARES = ("l2", "half_l2")


@dataclass(frozen=True)
class Fp16Limits:
    """The deviations of a channel that a norm can take in float16: least σ, most |x − μ|."""

    smallest_scale: float
    largest_deviation: float


def fp16_limits(norm: str, eps: float) -> Fp16Limits:
    """Return the limits of a norm, called as in a swap, whose statistics are in float16.

    Examples:
        >>> fp16_limits("half_l2", eps=0.0)
        Fp16Limits(smallest_scale=0.024805..., largest_deviation=255.96...)
    """
    if norm not in OF_SQUARES:
        return Fp16Limits(SMALLEST_NORMAL, LARGEST)
    smallest_variance = _ROUNDED_TO_INFINITY ** (-2 / 3) - eps
    return Fp16Limits(math.sqrt(max(smallest_variance, 0.0)), math.sqrt(_ROUNDED_TO_INFINITY))

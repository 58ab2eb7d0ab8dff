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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nmlightning.kernels.interface import NormKind
from nmlightning.norms.registry import find_norm, layer_class
from nmlightning.norms.scaled import normalise_scaled
from nmlightning.probe.report import DTYPES

# What becomes of a channel; the first that holds counts.
OUTCOMES = (
    "right",
    "input",  # float16 does not hold x − μ
    "not finite",  # the output has inf
    "dead",  # the output is 0 throughout
    "wrong",  # the output is off by more than TOLERANCE
    "gradient not finite",
    "gradient wrong",
    "NaN",  # the output has NaN
)
RIGHT, INPUT, INF, DEAD, WRONG, GRADIENT_NOT_FINITE, GRADIENT_WRONG, NAN = range(len(OUTCOMES))
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
    plain = RowNorm(eps)

    def run(chunk: Tensor, *slope: Tensor) -> dict[str, Tensor]:
        half = chunk.half()
        lost, _, _ = _round_input(chunk, plain)
        tried = {x: _run_norm_in_fp16(HALF_NORMS[x], x, half, slope, eps) for x in names}
        return {name: torch.where(lost, INPUT, outcome) for name, outcome in tried.items()}

    return _in_chunks(run, rows, *([] if gradients is None else [gradients]))


def _in_chunks(run: Callable[..., dict[str, Tensor]], *rows: Tensor) -> dict[str, Tensor]:
    """Return joined what `run` returns of some rows of each tensor at a time."""
    parts = max(1, rows[0].numel() // _ELEMENTS_AT_ONCE)
    found = [run(*chunks) for chunks in zip(*(x.tensor_split(parts) for x in rows), strict=True)]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def _round_input(rows: Tensor, norm: "RowNorm") -> tuple[Tensor, Tensor, Tensor]:
    """Return whether float16 loses each row of x; the outputs of x, and of x rounded to it."""
    right, rounded = (textbook(x.float(), norm, torch.float32) for x in (rows, rows.half()))
    return judge(rounded, right) != RIGHT, right, rounded


def _run_norm_in_fp16(
    norm: HalfNorm, name: str, half: Tensor, gradients: Sequence[Tensor], eps: float
) -> Tensor:
    exact_name, exact_options = norm.exact
    exact = _Run(exact_name, exact_options, half.float(), eps)
    tried = _Run(name, norm.options, half, eps)
    outcome = torch.full_like(half[:, 0], RIGHT, dtype=torch.uint8)
    for slope in gradients:
        _judge_gradients(outcome, exact, tried, slope, 2 * norm.picks)
    found = judge(tried.output, exact.output)
    return torch.where(found == RIGHT, outcome, found)


def judge(output: Tensor, right: Tensor, floor: float = _FLOOR) -> Tensor:
    """Return what became of each row of (R, n) outputs, of which float32 says what is right.

    Rows whose root mean square is below `floor` are judged as if it were that.
    """
    off = ~(_rms(output.float() - right) <= TOLERANCE * _rms(right).clamp(min=floor))
    outcome = off.to(torch.uint8) * WRONG
    outcome[off & (output == 0).all(1)] = DEAD
    outcome[~output.isfinite().all(1)] = INF
    outcome[output.isnan().any(1)] = NAN
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


class _Run:
    """One norm of (C, n) rows, forward, and backward when asked."""

    def __init__(self, name: str, options: Mapping[str, Any], rows: Tensor, eps: float) -> None:
        self.input, self.eps = rows, eps
        fixed = {"affine": False, "track_running_stats": False, "device": rows.device}
        make = layer_class(name, "batch", None)
        layer = make(len(rows), **find_norm(name).fixed, **options, **fixed, eps=eps)
        with torch.enable_grad():
            self.leaf = self._as_image(rows).requires_grad_()
            self.graph = layer(self.leaf)
        self.output = self.graph.detach().reshape(rows.shape)

    def gradient(self, of_output: Tensor) -> Tensor:
        """Return (C, n) the gradient by the input."""
        (result,) = torch.autograd.grad(self.graph, self.leaf, self._as_image(of_output))
        return result.reshape(self.input.shape)

    def _as_image(self, rows: Tensor) -> Tensor:
        """Return (C, n) rows as (1, C, n / w, w): the largest are found line by line."""
        n = rows.shape[1]
        width = min(n & -n, _WIDEST_LINE)  # a power of two that divides n
        return rows.reshape(1, len(rows), n // width, width)


class RowNorm(NamedTuple):
    """What a norm in evaluation does to rows (R, n), beside weight and bias."""

    eps: float
    centred: bool = True
    running: tuple[Tensor, ...] = ()  # (R, 1) mean and variance of a batch norm, which sums nothing
    p: float = 2.0  # 1 for (√(π/2) · mean |d|)² in the place of mean d²
    scaled: bool = False  # as our scaled norms


Formula = Callable[[Tensor, RowNorm, torch.dtype], Tensor]


def textbook(x: Tensor, norm: RowNorm, sums: torch.dtype) -> Tensor:
    """Return d / √(mean d² + eps), d being x − μ or x, each step rounded to the dtype of x."""
    if norm.scaled:
        return by_scaling(x, norm, sums)
    if norm.running:
        mean, variance = (q.to(x.dtype) for q in norm.running)
        return (x - mean) / (variance + norm.eps).sqrt()
    d = x - _mean(x, sums) if norm.centred else x
    if norm.p == 1:
        variance = (math.sqrt(math.pi / 2) * _mean(d.abs(), sums)).square()
    else:
        variance = _mean(d.square(), sums)
    return d / (variance + norm.eps).sqrt()


def by_scaling(x: Tensor, norm: RowNorm, sums: torch.dtype, p: float | None = None) -> Tensor:
    """Return what our scaled norms make of x, their means by pairs as far as n has twos in it."""
    twos = (x.shape[1] & -x.shape[1]).bit_length() - 1
    parts = x.reshape(len(x), x.shape[1] >> twos, *[2] * twos)
    settings = (None, None, twos + 1, norm.eps, norm.centred)
    return normalise_scaled(parts, *settings, p=p or norm.p).reshape(x.shape)


def _mean(x: Tensor, sums: torch.dtype) -> Tensor:
    """Return (R, 1) means, summed in float32 at once, or in half by pairs."""
    if sums == torch.float32:
        return x.float().mean(1, keepdim=True).to(x.dtype)
    total = x
    while total.shape[1] > 1:
        total = pad(total, (0, total.shape[1] % 2))
        total = total[:, ::2] + total[:, 1::2]
    return total / x.shape[1]


KINDS = ("layer", "rms", "instance", "group", "batch")


class Form(NamedTuple):
    """A way to compute norms in half: the dtype of all that is stored, the formula, the sums."""

    dtype: torch.dtype
    formula: Formula
    sums: torch.dtype
    kinds: tuple[str, ...] = KINDS


FORMS: Mapping[str, Form] = {
    "float16": Form(torch.float16, textbook, torch.float32),
    "float16_sums": Form(torch.float16, textbook, torch.float16),
    "bfloat16": Form(torch.bfloat16, textbook, torch.float32),
    "bfloat16_sums": Form(torch.bfloat16, textbook, torch.bfloat16),
    "scaled": Form(torch.float16, by_scaling, torch.float16, ("layer", "rms")),
    "l1": Form(torch.float16, partial(by_scaling, p=1.0), torch.float16, ("layer", "rms")),
}


@torch.no_grad()
def run_forms(rows: Tensor, kind: str, norm: RowNorm) -> dict[str, Tensor]:
    """Return for each form of a norm what would become of each row, (R,) indices of `OUTCOMES`.

    Of (R, n) float32 rows the right output is that of float32: of x rounded to float16, what that
    rounding loses being counted as "input"; in bfloat16 of x itself.
    """
    names = [name for name, form in FORMS.items() if kind in form.kinds]
    if norm.running:
        names = ["float16", "bfloat16"]

    def run(chunk: Tensor, *running: Tensor) -> dict[str, Tensor]:
        part = norm._replace(running=running)
        lost, right, rounded = _round_input(chunk, part)
        outcomes = {}
        for name in names:
            dtype, formula, sums, _ = FORMS[name]
            exact = right if dtype == torch.bfloat16 else rounded
            if name == "l1":  # which is right to be other than the norm
                exact = formula(chunk.half().float(), part, torch.float32)
            outcome = judge(formula(chunk.to(dtype), part, sums), exact)
            outcomes[name] = outcome.where(~lost | (dtype == torch.bfloat16), INPUT)
        return outcomes

    return _in_chunks(run, rows, *norm.running)


LARGEST = 65504.0
SMALLEST_NORMAL, _ROUNDED_TO_INFINITY = DTYPES["float16"]
OF_SQUARES = ("l2", "half_l2", "float16")


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
    # "float16" is the forward alone: its variance is not rounded to 0.
    smallest_variance = 2.0**-24 if norm == "float16" else _ROUNDED_TO_INFINITY ** (-2 / 3)
    smallest_variance -= eps
    return Fp16Limits(math.sqrt(max(smallest_variance, 0.0)), math.sqrt(_ROUNDED_TO_INFINITY))

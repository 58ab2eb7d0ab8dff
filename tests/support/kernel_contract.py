"""The contract of every backend's kernels: the float64 definition, to rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batch_norm_contract import NORMS, Norm, define, spread
from nmlightning.functional.statistics import LargestMean, PowerMean, Statistic
from nmlightning.kernels.interface import BatchNormKernels, Fused, LayerNorm, Tracking
from nmlightning.norms.layer_norm import LayerNormFunction

# Rounding of the output, and in float32 that of a few operations on values of one size.
TOLERANCES = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
WIDE = TOLERANCES[torch.float32]
EPS = 1e-5
STATISTICS: dict[str, Statistic] = {
    "l1": PowerMean(1.0),
    "linf": LargestMean(1),
    "top3": LargestMean(3),
}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """An input, a norm, and what is fused with it."""

    shape: tuple[int, ...] = (2, 3, 3, 4)
    statistic: str = "l1"
    fused: Fused | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    values: str = "random"
    learned: str = "both"

    def __str__(self) -> str:
        layout = "last" if self.channels_last else "first"
        parts = ["x".join(map(str, self.shape)), layout, NAMES[self.dtype], self.statistic]
        return "-".join([*parts, self.fused or "plain", self.values, self.learned])


HALF = torch.bfloat16
CASES = [
    # layouts
    *(
        Case(s, k)
        for s in [(2, 2, 3, 4), (12, 3), (3, 2, 5), (2, 2, 2, 3, 2)]
        for k in ("l1", "top3")
    ),
    *(
        Case(s, k, channels_last=True)
        for s in [(2, 3, 3, 4), (2, 3, 2, 3, 2)]
        for k in ("l1", "top3")
    ),
    # several tiles and programs, the last of them ragged
    *(Case((300, 2), k, "relu") for k in STATISTICS),
    *(Case((3, 1, 23, 14), k, "relu", HALF) for k in STATISTICS),
    *(Case((5, 34, 3, 3), k, "relu", channels_last=True) for k in ("l1", "top3")),
    # what is fused, in each dtype
    *(
        Case((2, 3, 3, 4), k, f, d, True)
        for k in ("l1", "linf")
        for f in ("relu", "add_relu")
        for d in (torch.float32, HALF)
    ),
    *(Case((2, 1, 3, 4), k, "add_relu", HALF) for k in STATISTICS),
    # values
    *(
        Case((40, 3), k, "relu" if v == "tied" else None, d, values=v)
        for v, d in (("constant", torch.float32), ("tied", HALF), ("far", torch.float32))
        for k in STATISTICS
    ),
    *(Case((2, 3), k, values=v) for v in ("random", "constant") for k in ("l1", "linf")),
    Case((3, 2), "top3"),
    *(Case((12, 3), k, "relu", learned=w) for k in ("l1", "linf") for w in ("none", "zero")),
    Case((12, 3), "l1", "relu", learned="weight"),
]
# Every width of rows and planes that a loop may treat in its own way.
WIDTHS = [
    Case(shape, statistic, fused, dtype, channels_last)
    for shape, channels_last in [
        ((7, 16, 8, 8), True),
        ((33, 5, 3, 5), True),
        ((3, 200, 4, 4), True),
        ((4, 16, 32, 32), False),
        ((2, 2, 37, 41), False),
        ((36, 5, 7, 7), False),
        ((2, 3, 5, 3, 2), True),
        *(((3, c, 4, 5), last) for c in (1, 3, 15, 17, 33, 65) for last in (False, True)),
    ]
    for statistic in ("l1", "top3")
    for fused in (None, "relu", "add_relu")
    for dtype in (torch.float32, HALF)
]
FLOAT16 = [
    Case((2, 3, 3, 4), statistic, fused, torch.float16, True)
    for statistic in ("l1", "linf")
    for fused in ("relu", "add_relu")
]


def draw(case: Case, device: str) -> tuple[list[Tensor | None], Tensor]:
    """Return x, residual, weight and bias, and a gradient of y."""
    channels = case.shape[1]
    x = 2 * torch.randn(case.shape) + 1
    if case.values == "constant":
        x = spread(torch.linspace(-1.1, 70.3, channels), x).expand(case.shape).contiguous()
    elif case.values == "tied":
        x = torch.randint(-2, 3, case.shape).float()
    elif case.values == "far":
        x = x + 300
    weight, bias = torch.randn(channels), torch.randn(channels)
    if case.learned == "zero":
        weight[0], weight[-1] = 0.0, 1e-30
    residual = torch.randn(case.shape) if case.fused == "add_relu" else None
    large = [x, residual, torch.randn(case.shape)]
    x, residual, grad = (
        None if q is None else _lay_out(q.to(case.dtype), case).to(device) for q in large
    )
    learned = [
        None if case.learned == "none" else weight.to(device),
        None if case.learned in ("none", "weight") else bias.to(device),
    ]
    return [x, residual, *learned], grad


def define_wide(
    norm: Norm, inputs: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Return in float64 what reaches ReLU, μ, ŝ, and the gradients from what comes through it.

    The inputs are x, residual, weight and bias.
    """
    leaves = [None if q is None else q.double().requires_grad_() for q in inputs]
    x, residual, weight, bias = leaves
    y, mean, scale = define(norm, x, weight, bias)
    y = y if residual is None else y + residual
    found = iter(torch.autograd.grad(y, [q for q in leaves if q is not None], grad.double()))
    gradients = [None if q is None else next(found) for q in leaves]
    return y.detach(), mean.detach(), scale.detach(), gradients


@dataclass
class Step:
    """What a backend's batch norm makes of x, residual, weight and bias, and of a gradient."""

    y: Tensor
    mean: Tensor
    variance: Tensor
    saved: list[Tensor]
    gradients: list[Tensor | None]

    def keeps(self, x: Tensor) -> bool:
        """Return whether x is kept for backward."""
        return any(q.data_ptr() == x.data_ptr() for q in self.saved)


def run(
    kernels: BatchNormKernels,
    statistic: Statistic,
    inputs: Sequence[Tensor | None],
    grad: Tensor | None = None,
    fused: Fused | None = None,
    constant: float = 1.25,
) -> Step:
    """Run the batch norm of a backend forward, and backward from a gradient, by default ones."""
    leaves = [None if q is None else q.detach().requires_grad_() for q in inputs]
    given, saved = [q for q in leaves if q is not None], []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, mean, variance = kernels.batch_norm(statistic)(
            *leaves, None, None, None, constant, EPS, None, fused
        )
    found = iter(torch.autograd.grad(y, given, torch.ones_like(y) if grad is None else grad))
    gradients = [None if q is None else next(found) for q in leaves]
    return Step(y.detach(), mean, variance, saved, gradients)


def check(case: Case, kernels: BatchNormKernels, device: str = "cpu", slack: float = 1.0) -> None:
    """Compare outputs and gradients with the definition in float64, channel by channel.

    `slack` times the tolerances, where rounding is not what it should be.
    """
    (x, residual, weight, bias), grad = draw(case, device)
    norm = NORMS[case.statistic]
    count = x.numel() // x.shape[1]
    inputs, statistic = (x, residual, weight, bias), STATISTICS[case.statistic]
    normalised = run(kernels, statistic, inputs, grad, case.fused, norm.constant(count))
    by_x, by_residual, by_weight, by_bias = normalised.gradients

    wide = x.double()
    # What ReLU lets pass is told by the output itself: in float64, an output of 1e-9 may be −1e-9.
    passed = grad if case.fused is None else grad.where(normalised.y > 0, 0)
    y, mean, scale, gradients = define_wide(norm, (x, residual, weight, bias), passed)
    size = y.abs() if residual is None else (y - residual.double()).abs() + residual.double().abs()
    y = y if case.fused is None else y.relu()

    assert normalised.y.dtype == by_x.dtype == x.dtype
    assert normalised.y.stride() == by_x.stride() == x.stride()
    tolerance = slack * TOLERANCES[case.dtype]
    # Without x, what is learned is found by the rounded output.
    learned = WIDE if normalised.keeps(x) else tolerance
    deviation = spread((scale**2 + EPS).sqrt(), x)
    gain = (1 if weight is None else spread(weight.double().abs(), x)) / deviation
    # The mean is known to the last bit of the largest x only.
    close(normalised.y, y, tolerance * size + WIDE * gain * wide.abs())
    close(normalised.mean, mean, WIDE * wide.abs())
    deviations = (wide - spread(mean, x)).abs() + WIDE * wide.abs()
    squares = deviations * (2 * deviations + wide.abs())
    close(normalised.variance, norm.variance(scale, count), 2 * WIDE * squares)
    # A gradient is a difference of terms as large as gain · g.
    terms = torch.maximum(gain * grad.double().abs(), gradients[0].abs())
    unsure = (deviations <= 2 * WIDE * wide.abs()) & (wide != spread(mean, x))  # of their sign
    limits = (tolerance + WIDE * wide.abs() / deviation) * terms
    close(torch.where(unsure, gradients[0], by_x), gradients[0], limits)
    if by_residual is not None:
        assert torch.equal(by_residual, passed)
    sizes = count * WIDE * grad.double().abs()
    if by_weight is not None:
        close(by_weight, gradients[2], sizes * (learned / WIDE) * (1 + deviations / deviation))
    if by_bias is not None:
        close(by_bias, gradients[3], sizes)


def check_nonfinite(
    statistic: str, value: float, kernels: BatchNormKernels, device: str = "cpu"
) -> None:
    """Hold a channel with NaN or an infinity to the formula's answers, and the others to theirs."""
    x = torch.randn(20, 3)
    x[4, 1] = value
    x, learned = x.to(device), torch.ones(3, device=device)
    normalised, clean = (
        run(kernels, STATISTICS[statistic], (q, None, learned, None), None, "relu")
        for q in (x, x.nan_to_num(0, 0, 0))
    )
    for values in (normalised.mean, normalised.variance):
        assert values.isfinite().tolist() == [True, False, True]
    by_x = normalised.gradients[0]
    for index in (0, 2):
        assert torch.equal(normalised.y[:, index], clean.y[:, index])
        assert by_x[:, index].isfinite().all()
    assert normalised.y[:, 1].isnan().all()
    assert by_x[:, 1].isnan().any()


def check_mask(kernels: BatchNormKernels, device: str = "cpu") -> None:
    """Count what ReLU lets pass where outputs are so small that many are rounded to 0."""
    x = torch.randn(64, 3).half().to(device)
    weight, bias = torch.full((3,), 3e-8, device=device), torch.zeros(3, device=device)
    normalised = run(kernels, STATISTICS["l1"], (x, None, weight, bias), None, "relu")
    passed = (normalised.y > 0).sum(0)
    assert (passed < (x > normalised.mean).sum(0)).all(), "no output was rounded to 0"
    assert torch.equal(normalised.gradients[3], passed.float())


def check_stages(
    shape: tuple[int, ...], channels_last: bool, kernels: BatchNormKernels, device: str = "cpu"
) -> None:
    """Hold what ranks compute of their part of a batch to its definition."""
    case = Case(shape, "top3", "add_relu", channels_last=channels_last, values="tied")
    (x, residual, gain, shift), grad = draw(case, device)
    channels = shape[1]
    count = x.numel() // channels
    exactly = {"rtol": 1e-6, "atol": 1e-6}
    flat = x.transpose(0, 1).flatten(1)
    mean = torch.linspace(-0.5, 0.5, channels, device=device)
    d = flat - mean[:, None]
    torch.testing.assert_close(kernels.sums(x), flat.sum(1), **exactly)
    torch.testing.assert_close(kernels.sums_of_sizes(x, mean), d.abs().sum(1), **exactly)
    for k in (1, 3, count + 2):
        positions, deviations = kernels.largest(x, mean, k)
        order = torch.sort(d.abs(), dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(positions[:, :count], order)
        torch.testing.assert_close(deviations[:, :count], d.gather(1, order), **exactly)
        assert not positions[:, count:].any()
        assert not deviations[:, count:].any()
    y = kernels.affine(x, residual, mean, gain, shift, "add_relu")
    expected = (x - spread(mean, x)) * spread(gain, x) + spread(shift, x)
    alone = kernels.affine(x, None, mean, gain, shift, None)
    torch.testing.assert_close(alone, expected, **exactly)
    torch.testing.assert_close(y, (expected + residual).relu(), **exactly)
    passed = grad.where(y > 0, 0)
    signs = torch.where(x > spread(mean, x), 1.0, -1.0)
    for statistic, slopes in ((PowerMean(1.0), signs), (LargestMean(3), torch.zeros_like(x))):
        terms = (passed, passed * (x - spread(mean, x)), slopes)
        sums = torch.stack([q.transpose(0, 1).flatten(1).sum(1) for q in terms])
        found = kernels.gradient_sums(grad, x, y, mean, statistic)
        torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-5)
    for pull in (shift, None):
        out, given = kernels.gradient(grad, x, y, mean, gain, mean, pull)
        dense = passed * spread(gain, x) + spread(mean, x)
        dense = dense if pull is None else dense - spread(pull, x) * signs
        torch.testing.assert_close(out, dense, **exactly)
        assert torch.equal(given, passed)
    out, given = kernels.gradient(grad, x, None, mean, gain, mean, None)
    torch.testing.assert_close(out, grad * spread(gain, x) + spread(mean, x), **exactly)
    assert given is grad


def check_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    centred: bool,
    learned: bool,
    norm: LayerNorm,
    device: str = "cpu",
    slack: float = 1.0,
) -> None:
    """Compare L1 layer and RMS norm with the formula in float64."""
    x, grad = (2 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
    constant = slice(0, shape[0] // 2)
    x[constant] = x[constant, :1]
    x, grad = x.to(device), grad.to(device)
    features = shape[-1]
    weight = torch.randn(features, device=device) if learned else None
    bias = torch.randn(features, device=device) if learned and centred else None
    given = [None if q is None else q.requires_grad_() for q in (x, weight, bias)]
    y = norm(*given, 1, 1.25, EPS, centred)
    found = torch.autograd.grad(y, [q for q in given if q is not None], grad)
    x, y = x.detach(), y.detach()
    leaves = [None if q is None else q.detach().double().requires_grad_() for q in given]
    expected = LayerNormFunction.apply(*leaves, 1, 1.0, 1.25, EPS, torch.float64, centred)
    gradients = torch.autograd.grad(expected, [q for q in leaves if q is not None], grad.double())
    tolerance = slack * TOLERANCES[dtype]
    if centred:
        shift = torch.zeros(features, device=device) if bias is None else bias
        shifts = shift.expand_as(x)[constant]
        close(y[constant], shifts, tolerance * shifts.abs())
    d = x.double() - (x.double().mean(1, keepdim=True) if centred else 0)
    inverse = 1 / ((1.25 * d.abs().mean(1, keepdim=True)).square() + EPS).sqrt()
    size = 1 if weight is None else weight.abs().amax().double()
    terms = (x.double().abs() * inverse + 1).amax(1, keepdim=True) * size
    assert ((y - expected).abs() <= 2 * tolerance * terms).all()
    terms = inverse * grad.double().abs().amax(1, keepdim=True) * size + gradients[0].abs()
    assert ((found[0] - gradients[0]).abs() <= 4 * tolerance * terms).all()
    learned = [own.double() for own in found[1:]]
    torch.testing.assert_close(learned, [*gradients[1:]], rtol=1e-5, atol=1e-5)


def check_tracking(track: Tracking, device: str = "cpu") -> None:
    """Move running statistics in channels where the batch's are finite, and count the batch."""
    nan, inf = float("nan"), float("inf")
    mean = torch.tensor([1.0, 2.0, nan, 4.0, inf, 1.0], device=device)
    variance = torch.tensor([1.0, inf, 2.0, 4.0, 1.0, 3e38], device=device)
    running = torch.zeros(6, device=device), torch.full((6,), -3e38, device=device)
    batches = torch.tensor(3, device=device)
    before = running[0]._version
    assert track(*running, batches, mean, variance, 0.5)
    assert running[0].tolist() == [0.5, 0, 0, 2, 0, 0.5]
    assert running[1][[1, 2, 4, 5]].tolist() == torch.full((4,), -3e38).tolist()
    assert running[1][0] > -3e38
    assert batches == 4
    assert running[0]._version > before


def close(found: Tensor, expected: Tensor, limits: Tensor) -> None:
    """Compare, in each channel, the largest error with the largest of the limits (N, C, *)."""
    limit = _largest(limits.detach())
    error = (found.double() - expected.detach()).abs()
    error = error if error.dim() == 1 else _largest(error)
    assert (error <= limit + 1e-30).all(), f"{(error / limit).max().item():.2f} of what is allowed"


def _largest(values: Tensor) -> Tensor:
    return values.transpose(0, 1).flatten(1).amax(1)


def _lay_out(x: Tensor, case: Case) -> Tensor:
    return x.contiguous(memory_format=FORMATS[x.dim()]) if case.channels_last else x

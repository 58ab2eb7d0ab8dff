"""The batch norms that the tests are about, and their naive definition."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning import norms

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# One bit of rounding in float64, times the length of the sums.
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Norm:
    """A row of the contract: the class, and the power or the counts of its statistic, if any."""

    name: str
    p: float | None = None
    k: int | None = None
    chunks: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, channels: int = 3, dims: int | str = 2, **settings: Any) -> nn.Module:
        """Return the layer with random values of what it learns, in the dtype asked for."""
        made = getattr(norms, f"{self.name}BatchNorm{dims}d")(channels, **self.options, **settings)
        for parameter in learned(made):
            nn.init.normal_(parameter, mean=1.0)
        return made

    @property
    def has_statistic(self) -> bool:
        """Return whether it divides by anything."""
        return not (self.p is None and self.k is None and self.chunks is None)

    def scale(self, d: Tensor, eps: float) -> Tensor:
        """Return ŝ of (C, n) deviations, by autograd's own rules and the library's conventions."""
        if not self.has_statistic:
            return d.new_full(d.shape[:1], 1 - eps).sqrt()
        if self.chunks is not None:
            parts = d.tensor_split(self.chunks, 1)
            ranges = [first_highest(part) + first_highest(-part) for part in parts]
            return torch.stack(ranges).mean(0) * self.constant(d.shape[1])
        size = torch.where(d > 0, d, -d)
        if self.k is None:
            bare = size if self.p == 1 else size.pow(self.p or 0)
            mean = bare.mean(1) if self.p == 1 else bare.mean(1).pow(1 / (self.p or 0))
            return mean * self.constant(d.shape[1])
        first = torch.sort(size.detach(), dim=1, descending=True, stable=True).indices[:, : self.k]
        return size.gather(1, first).mean(1) * self.constant(d.shape[1])

    def constant(self, n: int) -> float:
        """Return c for n elements of a channel."""
        if self.chunks is not None:
            lengths = [len(part) for part in torch.arange(n).tensor_split(self.chunks)]
            return len(lengths) / sum(1 / norms.gaussian_constant("range", m) for m in lengths)
        if self.k is not None:
            return norms.gaussian_constant("topk", n, k=self.k)
        return norms.gaussian_constant("lp", n, p=self.p or 0)

    def variance(self, scale: Tensor, n: int) -> Tensor:
        """Return what `running_var` averages."""
        return scale.square() * n / (n - 1) if self.has_statistic else scale.square()


STATISTICS = {
    "l1": Norm("L1", p=1.0),
    "linf": Norm("LInf", k=1),
    "top1": Norm("TopK", k=1, options={"k": 1}),
    "top3": Norm("TopK", k=3, options={"k": 3}),
    "top10": Norm("TopK", k=10),
    "lp1": Norm("Lp", p=1.0),
    "lp1.5": Norm("Lp", p=1.5, options={"p": 1.5}),
    "lp2": Norm("Lp", p=2.0, options={"p": 2}),
    "lp3.7": Norm("Lp", p=3.7, options={"p": 3.7}),
    "range1": Norm("Range", chunks=1, options={"chunks": 1}),
    "range5": Norm("Range", chunks=5, options={"chunks": 5}),
}
NORMS = {**STATISTICS, "mean": Norm("MeanOnly")}
# One of each statistic that is computed in another way.
DISTINCT = ["l1", "linf", "top10", "lp2", "lp3.7", "range5"]
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "1d": ((12, 3), lambda x: x),
    "1d-length": ((3, 3, 4), lambda x: x),
    "1d-strided": ((3, 3, 4), lambda x: torch.stack([x, x], -1)[..., 0]),
    "2d": ((2, 3, 2, 3), lambda x: x),
    "2d-channels-last": ((2, 3, 2, 3), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "2d-transposed": ((2, 3, 2, 3), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "2d-sliced": ((2, 3, 2, 3), lambda x: torch.cat([x, x], 1)[:, :3]),
    "3d": ((2, 3, 2, 3, 1), lambda x: x),
    "3d-channels-last": (
        (2, 3, 2, 3, 1),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    ),
}
every_statistic = pytest.mark.parametrize("norm", STATISTICS.values(), ids=STATISTICS)
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
each_kind = pytest.mark.parametrize("norm", [NORMS[n] for n in DISTINCT], ids=DISTINCT)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def first_highest(d: Tensor) -> Tensor:
    """Return the highest of each row, whose gradient goes to the first of equals."""
    first = torch.sort(d.detach(), dim=1, descending=True, stable=True).indices[:, :1]
    return d.gather(1, first).squeeze(1)


def learned(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have a gradient."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def batch(layout: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, int]:
    """Return an off-centre batch of that layout, and the layer's dimensions."""
    shape, arrange = LAYOUTS[layout]
    return arrange(2 * torch.randn(shape, dtype=dtype) + 1), int(layout[0])


def spread(channels: Tensor, like: Tensor) -> Tensor:
    """Return (C,) values in a shape that broadcasts over (N, C, *)."""
    return channels.view(1, -1, *[1] * (like.dim() - 2))


def define(
    norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the definition's output, μ and ŝ, differentiable by x, weight and bias."""
    flat = x.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    scale = norm.scale(flat - mean[:, None], eps)
    y = (x - spread(mean, x)) / spread((scale.square() + eps).sqrt(), x)
    y = y if weight is None else y * spread(weight, x)
    return y if bias is None else y + spread(bias, x), mean, scale


def gradients(y: Tensor, leaves: list[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    """Return the leaves' gradients for one fixed, random gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, leaves, grad)


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return how many bytes a layer keeps of x, and beside it, for backward."""
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def check_half(layer: nn.Module, define: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare with the float64 definition, up to one rounding of what is returned."""
    low, high = x.requires_grad_(), x.detach().double().requires_grad_()
    y, exact = layer(low), define(high)
    # Half of a last place of the output; 1e-5 for float32's x − μ, of 10 with 24 bits.
    close = {"rtol": {torch.float16: 2**-11, torch.bfloat16: 2**-8}[x.dtype], "atol": 1e-5}
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), exact, **close)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, low, grad)
    (expected,) = torch.autograd.grad(exact, high, grad.double())
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, **close)


def check_compilation(layer: nn.Module, *shape: int) -> None:
    """Compare the compiled layer with itself, on inputs of several sizes and that shape."""
    torch._dynamo.reset()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (4, 7):
        x = torch.randn(size, *shape, requires_grad=True)
        y, expected = compiled(x), plain(x)
        torch.testing.assert_close(y, expected)
        found = gradients(y, [x, *learned(layer)])
        torch.testing.assert_close(found, gradients(expected, [x, *learned(plain)]))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(torch.compile(layer.eval(), backend="aot_eager")(x), plain.eval()(x))
    torch._dynamo.reset()

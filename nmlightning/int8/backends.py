"""Products of quantised tensors, and which backend computes them: the one dispatch point.

    y = s_x · s_w · Σ (q_x − z_x) · (q_w − z_w) + bias

- formula: the definition. The whole numbers q − z as floating point, by torch's convolution. Exact
  in float32 until a sum reaches 2²⁴, then rounded.
- oneDNN, of convolutions on a CPU: uint8 by int8 with sums in int32.
- `torch._int_mm`, the same for matrix products, for convolutions on a CPU whose output has few
  places for its channels, which are unfolded to such products, and for 1×1 ones on CUDA.

The latter two are by operators that torch does not document, so they are tried before on a CPU.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmlightning.functional.reductions import is_eager
from nmlightning.int8.quantizer import Grid, by_kernel, centre
from nmlightning.kernels.dispatch import FORMULA, NOT_EAGER, requested_backend
from nmlightning.kernels.interface import Dispatch

MAX_DEPTH = (2**31 - 1) // (255 * 128)
"""So many products of uint8 and int8 an int32 holds the sum of, whatever they are."""
ONEDNN, INT_MM = "oneDNN int8", "torch._int_mm"
UNFOLDED = 8
"""Convolutions are unfolded up to so many places for an output channel: so much longer does oneDNN
take to prepare a weight than it takes to copy as many bytes."""
MAX_SPREAD = 4
"""The gradient of a stride is spread over up to so many times its places: integers are as much
faster."""


class Convolution(NamedTuple):
    """A convolution of (N, C, *spatial) by (O, C / groups, *kernel)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution without a bias."""
        return torch.convolution(
            x, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.stride), self.groups,
        )  # fmt: skip

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Return the spatial size of the output for an input's."""
        each = zip(size, kernel, *self[:3], strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]

    def unfold(self, x: Tensor, kernel: Sequence[int], padding: Tensor | float) -> Tensor:
        """Return what is below the kernel at each of its places, (N, *places, *kernel, C)."""
        rows = x.movedim(1, -1)
        if any(self.padding):
            sides = [p for p in reversed(self.padding) for _ in range(2)]
            rows = F.pad(rows, [0, 0, *sides], value=float(padding))
        for dim, (k, s, d) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), 1):
            rows = rows.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
        return rows.movedim(1 + len(kernel), -1)

    def input_gradient(self, grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Return the gradient by an input like one."""
        return self._gradients(grad, torch.empty_like(like, dtype=grad.dtype), weight, 0)

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by a weight like one."""
        return self._gradients(grad, x, torch.empty_like(weight, dtype=grad.dtype), 1)

    def _gradients(self, grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        found: Any = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.stride), self.groups, mask,
        )  # fmt: skip
        return found[which]  # type: ignore[no-any-return]

    def adjoint(self, weight: Tensor) -> "tuple[Convolution, Tensor] | None":
        """Return the convolution, and its weight, that maps a gradient to the input's.

        That is by the flipped, transposed weight, of a gradient that was `spread`. None where that
        is no gain, or the gradient would have to be cropped.
        """
        kernel = weight.shape[2:]
        padding = [
            d * (k - 1) - p for d, k, p in zip(self.dilation, kernel, self.padding, strict=True)
        ]
        if math.prod(self.stride) > MAX_SPREAD or min(padding) < 0:
            return None
        each, grouped = (1,) * len(kernel), weight.view(self.groups, -1, *weight.shape[1:])
        operation = self._replace(stride=each, padding=tuple(padding))
        return operation, _flip_kernels(grouped)

    def spread_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Return the spatial size of a spread gradient: the output's without a stride."""
        return self._replace(stride=(1,) * len(size)).output_size(size, kernel)

    def spread(self, q: Tensor, size: Sequence[int], zero: Tensor) -> Tensor:
        """Return the q of a gradient, spread to a size with zeros where a stride left out."""
        if max(self.stride) == 1:
            return q
        wide = q.new_empty(len(q), *size, q.shape[1]).fill_(zero).movedim(-1, 1)
        each: Any = (..., *(slice(None, None, step) for step in self.stride))
        wide[each] = q
        return wide


def _flip_kernels(weight: Tensor) -> Tensor:
    """Return (G · I, O, *kernel) of a (G, O, I, *kernel), each kernel from its end to its begin.

    Both lie in memory with the channels last.
    """
    if len(weight) == 1 and (found := by_kernel("flip_kernels", weight[0])) is not None:
        return found
    return weight.transpose(1, 2).flatten(0, 1).flip(*range(2, weight.dim() - 1)).contiguous()


class MatrixProduct(NamedTuple):
    """A product of (N, K) by a weight (O, K), (N, O)."""

    def unfold(self, x: Tensor, kernel: Sequence[int], padding: Tensor | float) -> Tensor:
        """Return x, which is what a convolution unfolds to."""
        return x

    def spread_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Return the spatial size of a gradient, which has none."""
        return []

    def spread(self, q: Tensor, size: Sequence[int], zero: Tensor) -> Tensor:
        """Return q, since there is no stride."""
        return q

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x · weightᵀ."""
        return F.linear(x, weight)

    def input_gradient(self, grad: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Return the gradient by the input."""
        return grad @ weight

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by the weight."""
        return grad.T @ x

    def adjoint(self, weight: Tensor) -> "tuple[MatrixProduct, Tensor]":
        """Return the product, and its weight, that maps a gradient to the input's."""
        return self, weight.T


Operation = Convolution | MatrixProduct


def select_backend(operation: Operation, x: Tensor, weight: Tensor) -> Dispatch:
    """Return what computes a product of x, quantised or not, and such a weight, now, and why."""
    if not is_eager(x):
        return NOT_EAGER
    if requested_backend() == FORMULA:
        return Dispatch(FORMULA, "asked for")
    depth = math.prod(weight.shape[1:])
    if depth > MAX_DEPTH:
        return Dispatch(FORMULA, f"int32 cannot hold a sum of {depth} products")
    if not x.numel():
        return Dispatch(FORMULA, "no values")
    if x.dtype == torch.float64:
        return Dispatch(FORMULA, "no integer sums for float64")
    if x.is_cpu:
        name, compute = (
            (INT_MM, _by_int_mm) if _is_unfolded(operation, x, weight) else (ONEDNN, _by_onednn)
        )
        reason = cpu_reason(name)
    elif x.is_cuda:
        name, compute, reason = INT_MM, _by_int_mm, _cuda_reason(operation, x, weight)
    else:
        reason = f"no integer sums for {x.device.type}"
    return Dispatch(FORMULA, reason) if reason else Dispatch(name, "", compute)


def _is_unfolded(operation: Operation, x: Tensor, weight: Tensor) -> bool:
    if isinstance(operation, MatrixProduct):
        return True
    size = operation.output_size(x.shape[2:], weight.shape[2:])
    fits = min(size) > 0 and len(x) * math.prod(size) <= UNFOLDED * len(weight)
    return fits and operation.groups == 1


def select_gradient_backend(
    operation: Operation, grad: Tensor, weight: Tensor, size: Sequence[int]
) -> tuple[Dispatch, tuple[Any, Tensor] | None]:
    """Return what computes the input's gradient, and the operation and weight it does that by.

    Those are None where it is the formula, which takes torch's own way. `size` is that of the
    spread gradient.
    """
    if not is_eager(grad):
        return NOT_EAGER, None
    adjoint = operation.adjoint(weight)
    if adjoint is None:
        reason = "the gradient of strides that multiply to over 4, or of more padding than kernel"
        return Dispatch(FORMULA, reason), None
    spread = grad.new_empty(1).expand(*grad.shape[:2], *size)
    backend = select_backend(adjoint[0], spread, adjoint[1])
    return backend, adjoint if backend.kernels else None


def weight_gradient(
    backend: Dispatch, operation: Operation, grad: Tensor, x: Tensor, weight: Tensor
) -> Tensor:
    """Return the gradient by a weight like one, of x and the output's gradient."""
    if backend.backend != INT_MM or isinstance(operation, MatrixProduct):
        return operation.weight_gradient(grad, x, weight)
    rows = grad.movedim(1, -1).flatten(0, -2)
    kernel = weight.shape[2:]
    found = rows.T @ operation.unfold(x, kernel, 0.0).reshape(len(rows), -1)
    return found.view(len(weight), *kernel, -1).movedim(-1, 1)


def multiply(
    backend: Dispatch, operation: Operation, q: Tensor, grid: Grid, weight: Tensor,
    scale: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return y in the dtype of the grid's scale.

    Args:
        backend: what `select_backend` returned.
        operation: what is computed.
        q: uint8, (N, C, *).
        grid: of q, with a 0-dimensional scale.
        weight: q_w − z_w, int8, (O, *).
        scale: s_w, 1 or O values.
        bias: (O,), or None.
    """
    compute = backend.kernels or _by_formula
    y: Tensor = compute(operation, q, grid, weight, scale, bias)
    return y


def _by_formula(
    operation: Operation, q: Tensor, grid: Grid, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    wide = grid.scale.dtype
    return scale_sums(operation.product(centre(q, grid, wide), weight.to(wide)), grid, scale, bias)


def scale_sums(sums: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the sums times the smaller of both scales, then the other, so as to stay finite."""
    shape = (-1, *[1] * (sums.dim() - 2))
    scales = grid.scale, scale.view(shape)
    y = sums.mul_(torch.minimum(*scales)).mul_(torch.maximum(*scales))
    return y if bias is None else y.add_(bias.to(y.dtype).view(shape))


def _by_onednn(
    operation: Operation, q: Tensor, grid: Grid, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    ops: Any = torch.ops.onednn
    scale = scale.flatten() * grid.scale.clamp(min=1)  # a sum times a large one may be infinite
    x = q, min(float(grid.scale), 1.0), int(grid.zero_point)
    none = torch.zeros_like(scale, dtype=torch.int)
    bias = None if bias is None else bias.float()
    # of the output: its scale, zero point and dtype, and nothing that follows
    plain: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    assert isinstance(operation, Convolution)
    settings = (*map(list, operation[:3]), operation.groups)
    packed = ops.qconv_prepack(weight, scale, 1.0, 0, *settings, list(q.shape))
    convolve = getattr(ops, f"qconv{q.dim() - 2}d_pointwise")
    return convolve(*x, packed, scale, none, bias, *settings, *plain)  # type: ignore[no-any-return]


@lru_cache
def cpu_reason(name: str) -> str:
    """Return why this torch and CPU do not compute integer sums exactly by a backend, or nothing.

    CPUs without VNNI may add two products in int16, which 2 · 255 · 127 does not fit.
    """
    one = torch.ones(1, dtype=torch.float32, device="cpu")[0]  # whatever the defaults are
    grid = Grid(one, 3 * one, 8)
    q, weight = (255 * one).to(torch.uint8).expand(2, 64), (127 * one).to(torch.int8).expand(5, 64)
    try:
        for dims in (0,) if name == INT_MM else (1, 2, 3):
            each, last = (1,) * dims, (..., *[None] * dims)
            operation = Convolution(each, (0,) * dims, each, 1) if dims else MatrixProduct()
            compute = _by_onednn if dims else _by_int_mm
            y = compute(operation, q[last], grid, weight[last], grid.scale.view(1), None)
            if (y != 252 * 127 * 64).any():
                return "this CPU adds products of int8 in int16, where they overflow"
    except (AttributeError, RuntimeError) as error:
        return f"this torch has no such operator: {str(error).splitlines()[0]}"
    return ""


def _cuda_reason(operation: Operation, x: Tensor, weight: Tensor) -> str:
    """Return why `torch._int_mm` does not compute a product on CUDA, or nothing if it does."""
    if isinstance(operation, Convolution):
        pointwise = {*weight.shape[2:], *operation.stride, operation.groups} == {1}
        if not pointwise or any(operation.padding):
            return "CUDA has integer sums for 1×1 convolutions and matrix products only"
    rows, depth, outputs = x.numel() // x.shape[1], x.shape[1], len(weight)
    if rows <= 16 or depth % 8 or outputs % 8:
        shape = f"{rows} by {depth} by {outputs}"
        return f"torch._int_mm takes over 16 rows and multiples of 8 on CUDA, got {shape}"
    return "" if hasattr(torch, "_int_mm") else "this torch has no torch._int_mm"


def _by_int_mm(
    operation: Operation, q: Tensor, grid: Grid, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    kernel, dims = weight.shape[2:], weight.dim() - 1
    shifted, zero = (q ^ 128).view(torch.int8), grid.zero_point - 128  # q − 128
    places = operation.unfold(shifted, kernel, zero)
    flat = weight.movedim(1, -1).flatten(1)
    sums = torch._int_mm(places.reshape(-1, flat.shape[1]), flat.T)
    if q.is_cpu:  # a sum would first be converted as a whole
        totals = torch._int_mm(flat.new_ones(1, flat.shape[1]), flat.T)
    else:
        totals = flat.sum(1, dtype=torch.int32)
    offset = zero.to(torch.int32) * totals
    y = (sums - offset).to(grid.scale.dtype).view(*places.shape[:dims], -1).movedim(-1, 1)
    return scale_sums(y, grid, scale, bias)

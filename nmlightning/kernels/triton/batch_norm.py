"""Batch norm by Triton kernels: which are launched, with which partition and memory."""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from nmlightning.functional.reductions import is_transformed, next_power_of_two
from nmlightning.functional.statistics import LargestMean, Statistic
from nmlightning.kernels.autograd import normalise_by
from nmlightning.kernels.interface import (
    Fused,
    Gradients,
    Normalise,
    Normalised,
    NormSpec,
    OptTensor,
    is_l1,
    lay_out_like,
)
from nmlightning.kernels.triton.backward import sum_gradients, write_gradient, write_whole_gradient
from nmlightning.kernels.triton.forward import (
    find_extremes,
    move_statistics,
    select_largest,
    sum_differences,
    sum_sizes,
    write_l1_output,
    write_output,
)
from nmlightning.kernels.triton.tiles import (
    Launcher,
    Partition,
    divide,
    divide_to_select,
    on_device_of,
)

STATISTICS = 5  # μ, unbiased variance, σ, ŝ, gain
LEAST_CODED = 4  # elements of a vector, whose codes are one integer
TRACKED_TOGETHER = 1024  # channels of a program that moves running statistics


# Running mean and variance, the count of batches, momentum: what forward moves, if it is there.
Running = tuple[OptTensor, OptTensor, OptTensor, float | None]
NONE: Running = (None, None, None, None)


class TritonBatchNorm:
    """L1, L∞ and Top(k) batch norm; three launches forward, two backward.

    Forward keeps x, and y only where a residual was added: without one, what ReLU let pass follows
    from x. On a CPU, where Triton is interpreted, it is for the tests.
    """

    def batch_norm(self, statistic: Statistic) -> Normalise:
        return partial(normalise_by, self, statistic)

    def forward(
        self,
        x: Tensor,
        residual: OptTensor,
        weight: OptTensor,
        bias: OptTensor,
        spec: NormSpec,
        running: Running = NONE,
    ) -> Normalised:
        statistics = x.new_empty(STATISTICS, x.shape[1], dtype=torch.float32)
        y, relu = torch.empty_like(x), spec.fused is not None
        with on_device_of(x):
            if is_l1(spec.statistic):
                selected: tuple[OptTensor, ...] = (None, None)
                differences, sizes, partition = None, None, divide(x, 1 if residual is None else 2)
                if partition.blocks > 1:
                    differences = _sum_differences(x, partition)
                    sizes = _sum_sizes(x, None, differences, partition)
                partition.launch(
                    write_l1_output, x, residual, y, differences, sizes, statistics, *running[:3],
                    weight, bias, running[3], spec.constant, spec.eps, RELU=relu,
                )  # fmt: skip
            else:
                selected = _select(
                    x, None, _k_of(spec.statistic), statistics, weight, spec, running
                )
                _write_output(x, residual, y, statistics[0], statistics[4], bias, relu)
        _note_moved(running)
        kept = y if spec.fused == "add_relu" else None
        return Normalised(y, statistics[0], statistics[1], (x, kept, statistics, bias, *selected))

    def can_move(self, running: Running, x: Tensor) -> bool:
        """Return whether forward moves these running statistics."""
        return can_move(running, x, 1)

    def backward(self, grad: Tensor, saved: tuple[OptTensor, ...], spec: NormSpec) -> Gradients:
        x, y, statistics, bias, positions, deviations = saved
        assert x is not None, "forward keeps it"
        assert statistics is not None, "forward keeps them"
        grad = lay_out_like(grad, x)
        relu = spec.fused == "relu"
        k = 0 if is_l1(spec.statistic) else _k_of(spec.statistic)
        passed = given = None if y is None else torch.empty_like(grad)
        out, codes, parts = torch.empty_like(x), None, None
        learned = statistics.new_empty(2, x.shape[1])
        partition = summed = divide(x, 2 if spec.fused is None else 3)  # ReLU wants registers
        with on_device_of(x):
            if summed.blocks > 1:
                codes = _codes(x, summed, relu) if relu or not k else None
                parts = _sum_gradients(
                    summed, grad, x, y, passed, codes, statistics, bias, relu, signs=not k
                )
                if passed is not None:
                    grad, y, passed = passed, None, None
                partition = divide(x, 2 if codes is None and (relu or not k) else 1)
            partition.launch(
                write_whole_gradient, grad, x, y, passed, codes, out, statistics, bias, parts,
                learned, positions, deviations, spec.constant, summed.blocks, RELU=relu, K=k,
                SELECTED=next_power_of_two(max(1, k)),
            )  # fmt: skip
        return Gradients(out, given, learned[0], learned[1])

    def sums(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros(x.shape[1], dtype=torch.float32)
        with on_device_of(x):
            partition = divide(x, 1)
            parts = _sum_differences(x, partition)
            first = x.select(0, 0).flatten(1)[:, 0] if x.dim() > 2 else x[0]
            return _fold(parts, partition) + first.float() * partition.rows

    def sums_of_sizes(self, x: Tensor, mean: Tensor) -> Tensor:
        if not x.numel():
            return torch.zeros_like(mean)
        with on_device_of(x):
            partition = divide(x, 1)
            return _fold(_sum_sizes(x, mean.contiguous(), None, partition), partition)

    def largest(self, x: Tensor, mean: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not x.numel():
            nothing = mean.new_zeros(x.shape[1], k)
            return nothing.long(), nothing
        with on_device_of(x):
            return _select(x, mean.contiguous(), k, None, None, None)

    def affine(
        self,
        x: Tensor,
        residual: OptTensor,
        mean: Tensor,
        gain: Tensor,
        bias: Tensor,
        fused: Fused | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        if x.numel():
            mean, gain, bias = (q.contiguous() for q in (mean, gain, bias))
            with on_device_of(x):
                _write_output(x, residual, y, mean, gain, bias, fused is not None)
        return y

    def gradient_sums(
        self, grad: Tensor, x: Tensor, y: OptTensor, mean: Tensor, statistic: Statistic
    ) -> Tensor:
        sums = mean.new_zeros(3, x.shape[1])
        if not x.numel():
            return sums
        signs = is_l1(statistic)
        grad, statistics = lay_out_like(grad, x), mean.contiguous().unsqueeze(0)
        with on_device_of(x):
            partition = divide(x, 2 if y is None else 3)
            parts = _sum_gradients(
                partition, grad, x, y, None, None, statistics, bias=None, relu=False, signs=signs
            )
            for row in range(len(parts)):
                sums[row] = _fold(parts[row], partition)
        if signs:
            sums[2].mul_(2).sub_(partition.rows)
        return sums

    def gradient(
        self,
        grad: Tensor,
        x: Tensor,
        y: OptTensor,
        mean: Tensor,
        gain: Tensor,
        offset: Tensor,
        pull: OptTensor,
    ) -> tuple[Tensor, Tensor]:
        grad = lay_out_like(grad, x)
        out = torch.empty_like(x)
        passed = None if y is None else torch.empty_like(grad)
        if x.numel():
            channels = [q if q is None else q.contiguous() for q in (mean, gain, offset, pull)]
            with on_device_of(x):
                divide(x, 2).launch(write_gradient, grad, x, y, passed, out, *channels)
        return out, (grad if passed is None else passed)


def track(
    running_mean: Tensor,
    running_var: Tensor,
    batches: OptTensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float | None,
) -> bool:
    """Do in one launch what `Tracking` says."""
    running = running_mean, running_var, batches, momentum
    if mean.dtype != torch.float32 or not (mean.is_contiguous() and can_move(running, mean, 0)):
        return False
    with on_device_of(mean), torch.no_grad():
        _launcher_of(mean.numel())(move_statistics, *running[:3], mean, variance, momentum)
    _note_moved(running)
    return True


def can_move(running: Running, like: Tensor, dim: int) -> bool:
    """Return whether kernels move them: plain (C,) float32, contiguous, and () int64, there."""
    *statistics, batches, momentum = running
    if momentum is None or is_transformed():
        return False
    for tensor in statistics:
        if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
            return False
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return False
        if tensor.shape != like.shape[dim : dim + 1] or tensor.device != like.device:
            return False
    return batches is None or (batches.dtype == torch.int64 and batches.device == like.device)


def _note_moved(running: Running) -> None:
    for changed in running[:3]:
        if changed is not None:
            torch.autograd.graph.increment_version(changed)


@lru_cache(maxsize=1024)
def _launcher_of(channels: int) -> Launcher:
    grid = (-(-channels // TRACKED_TOGETHER),)
    return Launcher(grid, (channels,), {"CHANNELS": TRACKED_TOGETHER})


def _sum_differences(x: Tensor, partition: Partition) -> Tensor:
    parts = _parts(x, partition)
    partition.launch(sum_differences, x, parts)
    return parts


def _sum_sizes(x: Tensor, mean: OptTensor, differences: OptTensor, partition: Partition) -> Tensor:
    parts = _parts(x, partition)
    partition.launch(sum_sizes, x, mean, differences, parts)
    return parts


def _select(
    x: Tensor,
    mean: OptTensor,
    k: int,
    statistics: OptTensor,
    weight: OptTensor,
    spec: NormSpec | None,
    running: Running = NONE,
) -> tuple[Tensor, Tensor]:
    """Return the positions and x − μ of the k largest |x − μ|, (C, k); fill the statistics."""
    partition = divide_to_select(x)
    parts = _parts(x, partition, 3)
    partition.launch(find_extremes, x, *parts)
    channels = x.shape[1]
    positions = x.new_empty(channels, k, dtype=torch.int64)
    deviations = x.new_empty(channels, k, dtype=torch.float32)
    constant, eps = (1.0, 0.0) if spec is None else (spec.constant, spec.eps)
    partition.launch_selection(
        select_largest, x, mean, *parts, positions, deviations, statistics, *running[:3], weight,
        running[3], constant, eps, K=k,
    )  # fmt: skip
    return positions, deviations


def _write_output(
    x: Tensor,
    residual: OptTensor,
    y: Tensor,
    mean: OptTensor,
    gain: Tensor,
    shift: OptTensor,
    relu: bool,
) -> None:
    partition = divide(x, 1 if residual is None else 2)
    partition.launch(write_output, x, residual, y, mean, gain, shift, RELU=relu)


def _sum_gradients(
    partition: Partition,
    grad: Tensor,
    x: Tensor,
    y: OptTensor,
    passed: OptTensor,
    codes: OptTensor,
    statistics: Tensor,
    bias: OptTensor,
    relu: bool,
    signs: bool,
) -> Tensor:
    parts = _parts(x, partition, 3 if signs else 2)
    gain = statistics[4] if relu else None
    partition.launch(
        sum_gradients, grad, x, y, passed, codes, statistics[0], gain, bias, parts,
        RELU=relu, SIGNS=signs,
    )  # fmt: skip
    return parts


def _codes(x: Tensor, partition: Partition, relu: bool) -> OptTensor:
    """Return room for a code of each element, or None where that saves little of reading x."""
    if partition.vector < LEAST_CODED:
        return None
    bits = partition.vector * (2 if relu else 1)
    count = x.numel() // partition.vector
    return x.new_empty(count, dtype=torch.uint8 if bits <= 8 else torch.int16)


def _parts(x: Tensor, partition: Partition, kinds: int = 1) -> Tensor:
    shape = (x.shape[1], partition.blocks)
    if partition.channels_last:
        shape = shape[::-1]
    return x.new_empty((kinds, *shape) if kinds > 1 else shape, dtype=torch.float32)


def _fold(parts: Tensor, partition: Partition) -> Tensor:
    return parts.sum(0 if partition.channels_last else 1)


def _k_of(statistic: Statistic) -> int:
    assert isinstance(statistic, LargestMean), "the backend supports no others"
    return statistic.k

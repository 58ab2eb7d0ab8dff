"""Batch norm by Triton kernels: which are launched, with which partition and memory."""

import torch
from torch import Tensor

from nmlightning.functional.reductions import next_power_of_two
from nmlightning.functional.statistics import LargestMean, Statistic
from nmlightning.kernels.interface import (
    Fused,
    Gradients,
    Normalised,
    NormSpec,
    OptTensor,
    is_l1,
    lay_out_like,
)
from nmlightning.kernels.triton.backward import sum_gradients, write_gradient, write_whole_gradient
from nmlightning.kernels.triton.forward import (
    move_statistics,
    sum_differences,
    sum_sizes,
    write_l1_output,
    write_output,
)
from nmlightning.kernels.triton.tiles import Partition, divide, divide_to_select, on_device_of
from nmlightning.kernels.triton.top_k import find_extremes, select_largest

STATISTICS = 5  # μ, unbiased variance, σ, ŝ, gain
TRACKED_TOGETHER = 1024  # channels of a program that moves running statistics


class TritonBatchNorm:
    """L1, L∞ and Top(k) batch norm; three launches forward, two backward.

    Forward keeps x, and y only where a residual was added: without one, what ReLU let pass follows
    from x. On a CPU, where Triton is interpreted, it is for the tests.
    """

    def forward(
        self, x: Tensor, residual: OptTensor, weight: OptTensor, bias: OptTensor, spec: NormSpec
    ) -> Normalised:
        statistics = x.new_empty(STATISTICS, x.shape[1], dtype=torch.float32)
        y, relu = torch.empty_like(x), spec.fused is not None
        with on_device_of(x):
            if is_l1(spec.statistic):
                selected: tuple[OptTensor, ...] = (None, None)
                differences, partition = _sum_differences(x)
                sizes = _sum_sizes(x, None, differences, partition)
                write_l1_output[partition.grid](
                    x, residual, y, differences, sizes, statistics, weight, bias, spec.constant,
                    spec.eps, *partition.sizes, **partition.constants, RELU=relu,
                    FOLD=partition.fold,
                )  # fmt: skip
            else:
                selected = _select(x, None, _k_of(spec.statistic), statistics, weight, spec)
                _write_output(x, residual, y, statistics[0], statistics[4], bias, relu)
        kept = y if spec.fused == "add_relu" else None
        return Normalised(y, statistics[0], statistics[1], (x, kept, statistics, bias, *selected))

    def backward(self, grad: Tensor, saved: tuple[OptTensor, ...], spec: NormSpec) -> Gradients:
        x, y, statistics, bias, positions, deviations = saved
        assert x is not None, "forward keeps it"
        assert statistics is not None, "forward keeps them"
        grad = lay_out_like(grad, x)
        relu = spec.fused == "relu"
        k = 0 if is_l1(spec.statistic) else _k_of(spec.statistic)
        passed = None if y is None else torch.empty_like(grad)
        out = torch.empty_like(x)
        learned = statistics.new_empty(2, x.shape[1])
        with on_device_of(x):
            parts, summed = _sum_gradients(grad, x, y, passed, statistics, bias, relu, signs=not k)
            partition = divide(x, 1 if k and not relu else 2)
            write_whole_gradient[partition.grid](
                grad if passed is None else passed, x, out, statistics, bias, parts, learned,
                positions, deviations, spec.constant, *partition.sizes, summed.blocks,
                **partition.constants, RELU=relu, FOLD=partition.fold, K=k,
                SELECTED=next_power_of_two(max(1, k)),
            )  # fmt: skip
        return Gradients(out, passed, learned[0], learned[1])

    def sums(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros(x.shape[1], dtype=torch.float32)
        with on_device_of(x):
            parts, partition = _sum_differences(x)
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
            parts, partition = _sum_gradients(
                grad, x, y, None, statistics, bias=None, relu=False, signs=signs
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
            partition = divide(x, 2)
            channels = [q if q is None else q.contiguous() for q in (mean, gain, offset, pull)]
            with on_device_of(x):
                write_gradient[partition.grid](
                    grad, x, y, passed, out, *channels, *partition.sizes, **partition.constants
                )
        return out, (grad if passed is None else passed)


def track(
    running_mean: Tensor,
    running_var: Tensor,
    batches: OptTensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
) -> None:
    """Do in one launch what `Tracking` says, with (C,) float32, contiguous, and () int64."""
    channels = mean.numel()
    with on_device_of(mean), torch.no_grad():
        move_statistics[-(-channels // TRACKED_TOGETHER),](
            running_mean, running_var, batches, mean, variance, momentum, channels,
            CHANNELS=TRACKED_TOGETHER, enable_fp_fusion=True,
        )  # fmt: skip
    for changed in (running_mean, running_var, batches):
        if changed is not None:
            torch.autograd.graph.increment_version(changed)


def _sum_differences(x: Tensor) -> tuple[Tensor, Partition]:
    partition = divide(x, 1)
    parts = _parts(x, partition)
    sum_differences[partition.grid](x, parts, *partition.sizes, **partition.constants)
    return parts, partition


def _sum_sizes(x: Tensor, mean: OptTensor, differences: OptTensor, partition: Partition) -> Tensor:
    parts = _parts(x, partition)
    sum_sizes[partition.grid](
        x, mean, differences, parts, *partition.sizes, **partition.constants, FOLD=partition.fold
    )
    return parts


def _select(
    x: Tensor,
    mean: OptTensor,
    k: int,
    statistics: OptTensor,
    weight: OptTensor,
    spec: NormSpec | None,
) -> tuple[Tensor, Tensor]:
    """Return the positions and x − μ of the k largest |x − μ|, (C, k); fill the statistics."""
    partition = divide_to_select(x)
    parts = _parts(x, partition, 3)
    find_extremes[partition.grid](x, *parts, *partition.sizes, **partition.constants)
    channels = x.shape[1]
    positions = x.new_empty(channels, k, dtype=torch.int64)
    deviations = x.new_empty(channels, k, dtype=torch.float32)
    rows, vectors, spatial, _, blocks = partition.sizes
    constant, eps = (1.0, 0.0) if spec is None else (spec.constant, spec.eps)
    select_largest[partition.selection_grid](
        x, mean, *parts, positions, deviations, statistics, weight, constant, eps,
        rows, vectors, spatial, partition.span, blocks, K=k, **partition.selection_constants,
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
    write_output[partition.grid](
        x, residual, y, mean, gain, shift, *partition.sizes, **partition.constants, RELU=relu
    )


def _sum_gradients(
    grad: Tensor,
    x: Tensor,
    y: OptTensor,
    passed: OptTensor,
    statistics: Tensor,
    bias: OptTensor,
    relu: bool,
    signs: bool,
) -> tuple[Tensor, Partition]:
    partition = divide(x, 2 if y is None else 3)
    parts = _parts(x, partition, 3 if signs else 2)
    gain = statistics[4] if relu else None
    sum_gradients[partition.grid](
        grad, x, y, passed, statistics[0], gain, bias, parts,
        *partition.sizes, **partition.constants, RELU=relu, SIGNS=signs,
    )  # fmt: skip
    return parts, partition


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

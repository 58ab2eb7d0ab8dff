"""Running statistics, moved towards a batch's in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmlightning.kernels.triton.tiles import on_device_of

CHANNELS = 1024


def track(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
) -> None:
    """Do what a batch norm does where it averages with a momentum; count the batch.

    Args:
        running_mean: (C,) float32, contiguous, changed in place.
        running_var: likewise.
        batches: () int64, or None.
        mean: (C,) float32 of the batch.
        variance: likewise.
        momentum: the batch's weight.
    """
    channels = mean.numel()
    with on_device_of(mean), torch.no_grad():
        track_kernel[-(-channels // CHANNELS),](
            running_mean, running_var, batches, mean, variance, momentum, channels,
            CHANNELS=CHANNELS, enable_fp_fusion=True,
        )  # fmt: skip
    for changed in (running_mean, running_var, batches):
        if changed is not None:
            torch.autograd.graph.increment_version(changed)


@triton.jit
def track_kernel(
    running_mean, running_var, batches, mean, variance, momentum, C, CHANNELS: tl.constexpr
):
    """Move both statistics, in channels where the batch's and the result are finite."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channels < C
    new_mean = tl.load(mean + channels, mask=mask, other=0.0)
    new_variance = tl.load(variance + channels, mask=mask, other=0.0)
    mask = mask & is_finite(new_mean) & is_finite(new_variance)
    move(running_mean + channels, new_mean, momentum, mask)
    move(running_var + channels, new_variance, momentum, mask)
    if batches is not None:
        count = batches + tl.arange(0, 1)
        first = tl.arange(0, 1) == tl.program_id(0)
        tl.store(count, tl.load(count, mask=first, other=0) + 1, mask=first)


@triton.jit
def move(running, newest, momentum, mask):
    """Store the moved statistics where they are finite."""
    old = tl.load(running, mask=mask, other=0.0)
    moved = old + momentum * (newest - old)
    tl.store(running, moved, mask=mask & is_finite(moved))


@triton.jit
def is_finite(values):
    """Return where values are neither infinite nor NaN."""
    return tl.abs(values) < float("inf")

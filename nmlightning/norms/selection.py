"""The k largest deviations of a channel, and the derivative of a statistic over some elements.

Among equal values the first position counts (lowest rank, then lowest position).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmlightning.norms.accumulation import half_mean, is_half
from nmlightning.norms.cross_rank import Share, keep_largest_of_ranks


class Selection(NamedTuple):
    """The elements that a statistic m was taken over: (C, k) positions and slopes.

    A position counts along (N, *spatial) of its channel; a slope is ∂m/∂d there, 0 where another
    rank holds the element.
    """

    positions: Tensor
    slopes: Tensor


def select_largest(deviations: Tensor, k: int, share: Share) -> tuple[Tensor, Selection]:
    """Return the mean of the k largest |d| of each channel, (C,), and which elements they are.

    Args:
        deviations: (N, C, *spatial).
        k: how many, at most what the ranks have in a channel together.
        share: the ranks.
    """
    positions, signed = _largest_deviations(deviations, k)
    values, mine = keep_largest_of_ranks(signed.abs(), share.group)
    slopes = torch.where(signed > 0, 1.0, -1.0).to(signed.dtype) / k
    if mine is not None:
        slopes = slopes * mine
    return mean_of_row(values), Selection(positions, slopes)


def mean_of_row(values: Tensor) -> Tensor:
    """Return the mean of each row of (C, k)."""
    return half_mean(values, (1,)) if is_half(values.dtype) else values.mean(1)


def add_at_selection(tensor: Tensor, selection: Selection, values: Tensor) -> Tensor:
    """Return (N, C, *spatial) `tensor` with (C, k) `values` added at the selected elements."""
    if not tensor.numel():
        return tensor
    sizes = (tensor.shape[0], *tensor.shape[2:])
    batch, *spatial = torch.unravel_index(selection.positions, sizes)
    channel = torch.arange(tensor.shape[1], device=tensor.device).unsqueeze(1)
    index = (batch, channel.expand_as(batch), *spatial)
    return tensor.index_put(index, values.to(tensor.dtype), accumulate=True)


def _largest_deviations(deviations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (C, k) positions and deviations of the k largest |d|, the first among equals.

    The k largest lie in the k rows (of the last dimension) with the largest row maxima; with ties
    broken by position in both steps, this holds for the order (value, then position) too. A rank
    with fewer than k elements fills up with zeros at position 0, which rank behind its own.
    """
    n, channels = deviations.shape[:2]
    if not deviations.numel():
        nothing = deviations.new_zeros(channels, k)
        return nothing.long(), nothing
    rows = deviations.reshape(n, channels, -1, deviations.shape[-1] if deviations.dim() > 2 else 1)
    height, width = rows.shape[2:]
    maxima = rows.abs().amax(3).transpose(0, 1).flatten(1)
    chosen = _first_largest(maxima, k).sort(1).values
    channel = torch.arange(channels, device=deviations.device).unsqueeze(1)
    candidates = rows[chosen // height, channel, chosen % height].flatten(1)
    best = _first_largest(candidates.abs(), k)
    positions = chosen.gather(1, best // width) * width + best % width
    missing = k - best.shape[1]
    return F.pad(positions, (0, missing)), F.pad(candidates.gather(1, best), (0, missing))


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of each row's k largest, the lowest index first among equals."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]

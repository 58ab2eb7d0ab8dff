"""Few numbers for many channels, in few kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

STATISTICS = ("min", "mean", "max", "median")


def summarise_channels(values: Sequence[Tensor]) -> Tensor:
    """Return the smallest, mean, largest and median value of the channels of each layer.

    Args:
        values: (C_l,) of each of L layers, at least one each, on one device.

    Returns:
        (L, 4), as `STATISTICS` names them, in the dtype of the values. Where a layer has a NaN, all
        but its median, which leaves it out, are NaN. The median of an even number is the lower one.
    """
    rows = pad_sequence(list(values), batch_first=True, padding_value=math.nan)
    counts = torch.tensor([len(v) for v in values], device=rows.device)
    padding = torch.arange(rows.shape[1], device=rows.device) >= counts[:, None]
    columns = [
        rows.masked_fill(padding, math.inf).amin(1),
        rows.masked_fill(padding, 0.0).sum(1) / counts,
        rows.masked_fill(padding, -math.inf).amax(1),
        rows.nanmedian(1).values,
    ]
    return torch.stack(columns, dim=1)

"""Batch norms by the range of a channel, a mean over chunks of it."""

import torch

from nmlightning.errors import check_whole_number
from nmlightning.norms.batch_norm import StatisticBatchNorm
from nmlightning.norms.gaussian import Constant
from nmlightning.norms.statistics import RangeMean


class RangeBatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = c(n/chunks) · mean over chunks of max x − min x.

    A channel's values, in the order (N, *), are cut into `chunks` of equal size. "paper" is
    c = 1/√(2 ln n) of its source, which makes the output's deviation about 0.55. See
    `StatisticBatchNorm` for the other arguments.

    Source: Banner et al. 2018 (arXiv 1805.11046).
    """

    def __init__(
        self,
        num_features: int,
        chunks: int = 16,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            bias=bias,
            track_running_stats=track_running_stats,
            constant=constant,
            stats_dtype=stats_dtype,
            sync=sync,
            device=device,
            dtype=dtype,
        )
        self.chunks = check_whole_number("chunks", chunks)
        self.statistic = RangeMean(self.chunks)


class RangeBatchNorm1d(RangeBatchNorm):
    """`RangeBatchNorm` of (N, C) or (N, C, L) inputs."""

    input_dims = (2, 3)


class RangeBatchNorm2d(RangeBatchNorm):
    """`RangeBatchNorm` of (N, C, H, W) inputs."""

    input_dims = (4,)


class RangeBatchNorm3d(RangeBatchNorm):
    """`RangeBatchNorm` of (N, C, D, H, W) inputs."""

    input_dims = (5,)

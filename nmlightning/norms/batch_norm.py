"""Batch norms by any statistic, and the names people know them by."""

from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nmlightning.errors import check_whole_number, given_by_keyword
from nmlightning.functional import batch_norm
from nmlightning.functional.constants import Constant, check_constant, check_power
from nmlightning.functional.plain import plain_batch_norm
from nmlightning.functional.reductions import is_half, is_transformed
from nmlightning.functional.statistics import LargestMean, PowerMean, RangeMean, Statistic
from nmlightning.kernels import autograd
from nmlightning.kernels.dispatch import select_backend_for, select_batch_norm
from nmlightning.kernels.interface import Dispatch
from nmlightning.norms.batch_norm_base import BatchNormBase, accumulation_dtype, activate

# By far faster from the dictionaries than through torch's __getattr__.
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_read, _look_up = itemgetter(*_TENSORS), attrgetter(*_TENSORS)


class StatisticBatchNorm(BatchNormBase):
    """Batch norm that divides by a scale estimate ŝ = c · statistic(x − μ).

        y = (x − μ) / √(ŝ² + eps) · weight + bias

    μ and ŝ are taken over all elements of a channel, in `stats_dtype`; (N, C, *) in, the same out.
    In evaluation it is exactly torch's batch norm: `running_mean` holds μ and `running_var` holds
    ŝ² with Bessel's factor n/(n−1), both averaged with torch's momentum convention, and the five
    state keys are those of `torch.nn.BatchNorm2d`, into which a checkpoint loads. A channel whose
    batch statistics are not finite keeps its running statistics; where all batches
    are averaged equally, such a batch is left out of the average in every channel. Use a
    subclass: this one has no statistic.

    Args:
        num_features: C.
        eps: added to the variance ŝ², so its square root is added to ŝ where ŝ is 0.
        momentum: weight of the newest batch in the running statistics; None averages all equally.
        affine: learn a weight and a bias for each channel.
        bias: learn that bias too; without effect where `affine` is False.
        track_running_stats: keep running statistics; else evaluation uses the batch's own.
        constant: c. "exact" makes ŝ estimate a Gaussian's standard deviation without bias (for Lp
            as n → ∞; see `gaussian_constant`), "paper" is the published constant,
            "official" that of the authors' code, "none" is 1, and a number is c itself.
        stats_dtype: dtype of accumulation: `torch.float32` or `torch.float64`; by default float32,
            and float64 for float64 inputs. Or `torch.float16` or `torch.bfloat16`: then all is
            computed in that dtype, whatever the input's (pure half).
        sync: in training, share the statistics among all ranks, as one process would compute them
            on the ranks' batches concatenated in rank order. Has no effect without distribution.

    Raises:
        InputError: a setting outside what is allowed; another number of channels than C; k > n.
        ValueError: one value per channel in training, as torch does.

    Source: Hoffer et al. 2018, §4 (arXiv 1803.01814).
    """

    __jit_ignored_attributes__ = ("statistic",)
    statistic: Statistic

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, bias: bool = True,
        constant: Constant | float = "exact", stats_dtype: torch.dtype | str | None = None,
        sync: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, bias=bias,
            track_running_stats=track_running_stats, stats_dtype=stats_dtype,
            sync=sync, device=device, dtype=dtype,
        )  # fmt: skip
        self.constant = check_constant(constant)

    def backend_for(self, input: Tensor) -> Dispatch:
        """Return the backend that computes such an input in training, and why, without running."""
        dtype = accumulation_dtype(input.dtype, self.stats_dtype)
        return select_backend_for(input, "batch", self.statistic, dtype)

    def _at_once(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        normalise = select_batch_norm(input, self.statistic, self.stats_dtype)
        if normalise is None or (self.sync and self._group() is not None):
            return None
        shape, channels = input.shape, self.num_features
        count = input.numel() // channels
        if len(shape) not in (self.input_dims or range(2, 64)) or shape[1] != channels or count < 2:
            return None
        try:
            tensors = _read({**self._parameters, **self._buffers})
        except KeyError:  # one is computed: pruned, or a parametrization's
            tensors = _look_up(self)
        tracked = self.training and self.track_running_stats
        if not tracked:
            tensors = (*tensors[:2], None, None, None)
        constant = self.statistic.constant(count, self.constant)
        settings = (*tensors, constant, self.eps, self.momentum)
        found, fused = normalise(input, residual, *settings, self.fused), None
        if not found and residual is not None and self.fused == "add_relu":  # it is not like x
            found, fused = normalise(input, None, *settings, None), self.fused
        if tracked and len(found) > 1:
            self._track(*found[1:])
        return activate(found[0], residual, fused) if found else None

    def _normalise(
        self, input: Tensor, residual: Tensor | None, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(input.dtype, self.stats_dtype)
        if group is None and is_transformed():
            constant = self.statistic.constant(input.numel() // input.shape[1], self.constant)
            settings = (self.statistic, constant, self.eps, dtype)
            y, mean, variance = plain_batch_norm(input, self.weight, self.bias, *settings)
            return activate(y, residual, self.fused), mean, variance
        requested = (self.statistic, self.constant, self.eps)
        staged = group is not None and not isinstance(self.statistic, RangeMean)
        kernels = self.backend_for(input).kernels if staged else None
        if kernels is not None:
            fits = residual is None or autograd.is_like(residual, input)
            fused, added = (self.fused, residual) if fits else (None, None)
            y, mean, variance = autograd.RankBatchNormFunction.apply(
                input, added, self.weight, self.bias, kernels, *requested, fused, group
            )
            return (y if fits else activate(y, residual, self.fused)), mean, variance
        arguments = (self.weight, self.bias, *requested, dtype, group)
        if is_half(dtype):
            y, mean, variance = batch_norm.apply_without_autocast(
                batch_norm.HalfBatchNormFunction, input, *arguments
            )
        else:
            y, mean, variance = batch_norm.BatchNormFunction.apply(input, *arguments)
        return activate(y, residual, self.fused), mean, variance


class L1BatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = √(π/2) · mean |x − μ|; see `StatisticBatchNorm`."""

    statistic = PowerMean(1.0)


class LInfBatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = c(n) · max |x − μ|; see `StatisticBatchNorm`."""

    statistic = LargestMean(1)


class LpBatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = c(p) · (mean |x − μ|^p)^(1/p), p ≥ 1; p = 2 is torch's own batch norm.

    See `StatisticBatchNorm` for the other arguments.
    """

    @given_by_keyword("p")
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, p: float = 1.0, bias: bool = True,
        constant: Constant | float = "exact", stats_dtype: torch.dtype | str | None = None,
        sync: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, bias=bias,
            track_running_stats=track_running_stats, constant=constant, stats_dtype=stats_dtype,
            sync=sync, device=device, dtype=dtype,
        )  # fmt: skip
        self.p = check_power(p)
        self.statistic = PowerMean(self.p)


class TopKBatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = c(n, k) · mean of the k largest |x − μ|; see `StatisticBatchNorm`."""

    @given_by_keyword("k")
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, k: int = 10, bias: bool = True,
        constant: Constant | float = "exact", stats_dtype: torch.dtype | str | None = None,
        sync: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, bias=bias,
            track_running_stats=track_running_stats, constant=constant, stats_dtype=stats_dtype,
            sync=sync, device=device, dtype=dtype,
        )  # fmt: skip
        self.k = check_whole_number("k", k)
        self.statistic = LargestMean(self.k)


class L1BatchNorm1d(L1BatchNorm, nn.BatchNorm1d):
    """`L1BatchNorm` of (N, C) or (N, C, L) inputs."""


class L1BatchNorm2d(L1BatchNorm, nn.BatchNorm2d):
    """`L1BatchNorm` of (N, C, H, W) inputs.

    Examples:
        >>> L1BatchNorm2d(16)(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """


class L1BatchNorm3d(L1BatchNorm, nn.BatchNorm3d):
    """`L1BatchNorm` of (N, C, D, H, W) inputs."""


class LInfBatchNorm1d(LInfBatchNorm, nn.BatchNorm1d):
    """`LInfBatchNorm` of (N, C) or (N, C, L) inputs."""


class LInfBatchNorm2d(LInfBatchNorm, nn.BatchNorm2d):
    """`LInfBatchNorm` of (N, C, H, W) inputs."""


class LInfBatchNorm3d(LInfBatchNorm, nn.BatchNorm3d):
    """`LInfBatchNorm` of (N, C, D, H, W) inputs."""


class LpBatchNorm1d(LpBatchNorm, nn.BatchNorm1d):
    """`LpBatchNorm` of (N, C) or (N, C, L) inputs."""


class LpBatchNorm2d(LpBatchNorm, nn.BatchNorm2d):
    """`LpBatchNorm` of (N, C, H, W) inputs."""


class LpBatchNorm3d(LpBatchNorm, nn.BatchNorm3d):
    """`LpBatchNorm` of (N, C, D, H, W) inputs."""


class TopKBatchNorm1d(TopKBatchNorm, nn.BatchNorm1d):
    """`TopKBatchNorm` of (N, C) or (N, C, L) inputs."""


class TopKBatchNorm2d(TopKBatchNorm, nn.BatchNorm2d):
    """`TopKBatchNorm` of (N, C, H, W) inputs."""


class TopKBatchNorm3d(TopKBatchNorm, nn.BatchNorm3d):
    """`TopKBatchNorm` of (N, C, D, H, W) inputs."""


class RangeBatchNorm(StatisticBatchNorm):
    """Batch norm by ŝ = c(n/chunks) · mean over chunks of max x − min x.

    A channel's values, in the order (N, *), are cut into `chunks` of equal size. "paper" is
    c = 1/√(2 ln m) of its source, for chunks of m values, which makes the output's deviation about
    0.55 and which no published run used; "official" is the 0.5402/√(2 ln m) of its authors' code,
    which makes it 1.12 … 1.01 for m = 10² … 10⁵. See `StatisticBatchNorm` for the other arguments.

    Source: Banner et al. 2018 (arXiv 1805.11046).
    """

    @given_by_keyword("chunks")
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, chunks: int = 16,
        bias: bool = True, constant: Constant | float = "exact",
        stats_dtype: torch.dtype | str | None = None, sync: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps=eps, momentum=momentum, affine=affine, bias=bias,
            track_running_stats=track_running_stats, constant=constant, stats_dtype=stats_dtype,
            sync=sync, device=device, dtype=dtype,
        )  # fmt: skip
        self.chunks = check_whole_number("chunks", chunks)
        self.statistic = RangeMean(self.chunks)


class RangeBatchNorm1d(RangeBatchNorm, nn.BatchNorm1d):
    """`RangeBatchNorm` of (N, C) or (N, C, L) inputs."""


class RangeBatchNorm2d(RangeBatchNorm, nn.BatchNorm2d):
    """`RangeBatchNorm` of (N, C, H, W) inputs."""


class RangeBatchNorm3d(RangeBatchNorm, nn.BatchNorm3d):
    """`RangeBatchNorm` of (N, C, D, H, W) inputs."""

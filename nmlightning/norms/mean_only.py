"""Mean-only batch norm: the norm between layers whose weights are normalised already."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nmlightning.functional.batch_norm import HalfCentreFunction, apply_without_autocast
from nmlightning.functional.reductions import is_half, is_transformed, share_sums, sum_over_ranks
from nmlightning.functional.statistics import is_readable, reduced_dims
from nmlightning.norms.batch_norm_base import BatchNormBase, accumulation_dtype, activate


class MeanOnlyBatchNorm(BatchNormBase):
    """Batch norm that subtracts the mean and keeps the scale.

        y = x − μ + bias

    μ is taken over all elements of a channel, in `stats_dtype`; (N, C, *) in, the same out. The
    gradient is g − mean g, also of a second derivative (but not in pure half), and nothing is kept
    for it.

    The state has torch's five keys: `weight` is 1 with `requires_grad` False, since a trained
    weight that is never used stops DistributedDataParallel, and `running_var` is 1 − eps. So
    evaluation is torch's batch norm, into which a checkpoint loads. From the checkpoint of another
    norm the layer takes the mean, the bias and the count, not the scale. A weight set to anything
    else has no effect; `eval()` and `state_dict()` make it 1 again.

    One value per channel is an error in training, as in torch: the output would be the bias alone.
    Use a subclass for a fixed number of dimensions.

    Args:
        num_features: C.
        eps: no part of the formula; `running_var` is 1 − eps, so that torch divides by 1.
        momentum: weight of the newest batch in the running mean; None averages all equally.
        affine: learn a bias for each channel, and have the weight.
        bias: learn that bias; without effect where `affine` is False.
        track_running_stats: keep a running mean; else evaluation uses the batch's own.
        stats_dtype: dtype of accumulation: `torch.float32` or `torch.float64`; by default float32,
            and float64 for float64 inputs. Or `torch.float16` or `torch.bfloat16`: then all is
            computed in that dtype, whatever the input's (pure half).
        sync: in training, take the mean over all ranks' elements, however many each has. Has no
            effect without distribution.

    Raises:
        InputError: a setting outside what is allowed; another number of channels than C.
        ValueError: one value per channel in training.

    Source: Salimans and Kingma 2016, §4 (arXiv 1602.07868).
    """

    has_scale = False

    def scales(self) -> list[nn.Parameter]:
        """Return the weight, or what a pruned or otherwise computed one is computed of."""
        return [
            q for name, q in self._parameters.items() if name.startswith("weight") and q is not None
        ]

    def reset_parameters(self) -> None:
        """Make the layer what it was when it was new."""
        super().reset_parameters()
        self.drop_scale()

    def reset_running_stats(self) -> None:
        """Set the running mean and the count to 0."""
        super().reset_running_stats()
        if self.running_var is not None:
            self.running_var.fill_(1 - self.eps)

    @torch.no_grad()
    def drop_scale(self) -> None:
        """Make `weight` and `running_var` those of a batch norm that divides by 1."""
        for scale in self.scales():
            scale.requires_grad_(False).fill_(1)
            scale.grad = None
        if self.running_var is not None:
            self.running_var.fill_(1 - self.eps)

    def train(self, mode: bool = True) -> "MeanOnlyBatchNorm":
        """Set the mode; in evaluation, what reads the state shall find no scale."""
        super().train(mode)
        if not mode:
            self.drop_scale()
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.drop_scale()
        super()._save_to_state_dict(*arguments)

    def _normalise(
        self, input: Tensor, residual: Tensor | None, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(input.dtype, self.stats_dtype)
        if is_half(dtype) and not is_transformed():
            y, mean = apply_without_autocast(HalfCentreFunction, input, self.bias, dtype, group)
        else:
            wide = input.to(torch.promote_types(dtype, torch.float32))
            mean = _mean(wide, group)
            if is_readable(mean) and not math.isfinite(mean.detach().sum().item()):
                wide = input.double()
                mean = _mean(wide, group)
            shift = -mean if self.bias is None else self.bias.to(mean.dtype) - mean
            y = (wide + shift.view(-1, *[1] * (input.dim() - 2))).to(input.dtype)
        tracked = mean.detach()
        y = activate(y, residual, self.fused)
        return y, tracked, torch.full_like(tracked, 1 - self.eps)

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *arguments: Any,
    ) -> None:
        """Load the state but for the scale, which another norm's checkpoint may have."""
        for name, value in (("weight", 1.0), ("running_var", 1 - self.eps)):
            if prefix + name in state_dict:
                state_dict[prefix + name] = torch.full_like(state_dict[prefix + name], value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


class MeanOnlyBatchNorm1d(MeanOnlyBatchNorm, nn.BatchNorm1d):
    """`MeanOnlyBatchNorm` of (N, C) or (N, C, L) inputs."""


class MeanOnlyBatchNorm2d(MeanOnlyBatchNorm, nn.BatchNorm2d):
    """`MeanOnlyBatchNorm` of (N, C, H, W) inputs.

    Examples:
        >>> MeanOnlyBatchNorm2d(16)(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 16, 4, 4])
    """


class MeanOnlyBatchNorm3d(MeanOnlyBatchNorm, nn.BatchNorm3d):
    """`MeanOnlyBatchNorm` of (N, C, D, H, W) inputs."""


def _mean(wide: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the mean of each channel, (C,), differentiable any number of times."""
    dims = reduced_dims(wide)
    own = wide.numel() // wide.shape[1]
    if group is None:
        return wide.sum(dims) / own  # the backward of mean would divide all elements
    mean: Tensor = _RankMean.apply(wide.sum(dims), own, group)
    return mean


class _RankMean(torch.autograd.Function):
    """The mean over all ranks, of a rank's sums and count; so the gradients' sum over the count."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, own: int, group: ProcessGroup) -> Tensor:
        totals, ctx.share = share_sums(sums, own, group)
        mean: Tensor = totals / ctx.share.total
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total: Tensor = _RankSum.apply(grad, ctx.share.group)
        return total / ctx.share.total, None, None


class _RankSum(torch.autograd.Function):
    """The sum of all ranks' values; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_over_ranks(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _RankSum.apply(grad, ctx.group), None

"""Schedules that begin with a linear warm-up."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nmlightning.errors import check_whole_number


class InverseSquareRootLR(LRScheduler):
    """Raise the learning rate linearly, then let it fall with the inverse square root of the steps.

        η_t = η · min(t / W, √(W / t)),   t = 1, 2, … the step, W = warmup_steps

    η, the optimizer's own rate, is reached at step W. The paper's d^(−1/2) · min(t^(−1/2),
    t · W^(−3/2)) has η = (d W)^(−1/2): 7·10⁻⁴ for width d = 512 and W = 4000.

    Args:
        optimizer: its groups each have an η.
        warmup_steps: W, 1 or more.
        last_epoch: the last step that was done, t − 1; −1 for none.

    Raises:
        InputError: for less than one step of warm-up.

    Source: Vaswani et al. (2017), section 5.3, https://arxiv.org/abs/1706.03762.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.zeros(1)], lr=1.0)
        >>> schedule = InverseSquareRootLR(optimizer, warmup_steps=4)
        >>> for _ in range(15):
        ...     optimizer.step()
        ...     schedule.step()
        >>> schedule.get_last_lr()
        [0.5]
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 4000, last_epoch: int = -1
    ) -> None:
        self.warmup_steps = check_whole_number("warmup_steps", warmup_steps)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        step, warmup = self.last_epoch + 1, self.warmup_steps
        factor = min(step / warmup, math.sqrt(warmup / step))
        return [float(base) * factor for base in self.base_lrs]


class WarmupMultiStepLR(LRScheduler):
    """Raise the learning rate linearly over some epochs, then multiply it by γ at milestones.

        η_t = η · min(1, t / W) · γ^|{m ∈ milestones : m < t}|,   t = 1, 2, … the epoch

    Args:
        optimizer: its groups each have an η.
        milestones: epochs after which the rate is multiplied, as of torch's `MultiStepLR`.
        warmup_epochs: W, 1 or more; 1 is no warm-up.
        gamma: γ.
        last_epoch: the last epoch that was done, t − 1; −1 for none.

    Raises:
        InputError: for less than one epoch of warm-up.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = WarmupMultiStepLR(optimizer, [30], warmup_epochs=4)
        >>> schedule.get_last_lr()
        [0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        warmup_epochs: int = 5,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        self.warmup_epochs = check_whole_number("warmup_epochs", warmup_epochs)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        epoch = self.last_epoch
        drops = sum(milestone <= epoch for milestone in self.milestones)
        factor = min(1.0, (epoch + 1) / self.warmup_epochs) * self.gamma**drops
        return [float(base) * factor for base in self.base_lrs]

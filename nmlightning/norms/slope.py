"""t = ∂m/∂d of a statistic m: dense for a power mean, else at the elements that were selected."""

from torch import Tensor

from nmlightning.norms.accumulation import sum_of
from nmlightning.norms.cross_rank import Count
from nmlightning.norms.power_mean import power_mean_slope
from nmlightning.norms.selection import Selection, add_at_selection
from nmlightning.norms.statistics import PowerMean, Statistic


class Slope:
    """The derivative of a statistic of (N, C, *), without a dense tensor where it is sparse.

    Args:
        x: (N, C, *), of the dtype of accumulation.
        mean: μ, (C,).
        magnitude: m of each channel, (C,).
        statistic: which one.
        count: elements of a channel, on all ranks.
        selection: the elements that m depends on, or None for all.
    """

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        magnitude: Tensor,
        statistic: Statistic,
        count: Count,
        selection: Selection | None,
    ) -> None:
        self.selection = selection
        self.count = count
        self.dims, self.shape = reduced_dims(x), channel_shape(x)
        if isinstance(statistic, PowerMean):
            self.reflected = power_mean_slope(
                mean.view(self.shape) - x, magnitude.view(self.shape), statistic.p
            )

    def sum(self) -> Tensor:
        """Return Σt of this rank's elements, (C,)."""
        if self.selection is not None:
            return self.selection.slopes.sum(1)
        return -sum_of(self.reflected, self.dims) / self.count

    def add_to(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """Add factor · t to `tensor`, in place, with a factor for each channel."""
        if self.selection is None:
            each = (-factor / self.count).to(tensor.dtype)
            return tensor.addcmul_(self.reflected, each.view(self.shape))
        return add_at_selection(tensor, self.selection, factor.unsqueeze(1) * self.selection.slopes)


def reduced_dims(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of (N, C, *) that a channel's elements lie along."""
    return (0, *range(2, x.dim()))


def channel_shape(x: Tensor) -> list[int]:
    """Return the shape that spreads (C,) over (N, C, *)."""
    return [1, -1] + [1] * (x.dim() - 2)

"""The mean loss against the mean over all images."""

import pytest
import torch

from nmlightning.tasks.classification import MeanLoss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_mean_over_images(dtype: torch.dtype) -> None:
    losses, sizes = torch.rand(5).to(dtype).requires_grad_(), [8, 8, 8, 8, 3]
    metric = MeanLoss()
    for loss, images in zip(losses, sizes, strict=True):
        metric.update(loss, images)
    weights = torch.tensor(sizes, dtype=torch.float64)
    expected = (losses.double() * weights).sum() / 35
    found = metric.compute()
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # five sums in float32
    metric.reset()
    metric.update(torch.tensor(torch.nan), 1)
    assert metric.compute().isnan()

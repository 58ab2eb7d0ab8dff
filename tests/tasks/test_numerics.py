"""Numbers that are refused before a fit, and what half precision does not spoil."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from nmlightning.errors import InputError
from nmlightning.tasks.numerics import SoundNumerics, check_optimizer, exact_metrics
from trainers import quiet_trainer

HALF = [nn.Parameter(torch.ones(2, dtype=torch.float16))]
FULL = [nn.Parameter(torch.ones(2))]


class Grows(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1, growth: float = torch.inf) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["growth"] = growth


class Factored(torch.optim.SGD):
    def __init__(self, params: Any, **eps: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0] |= eps


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.SGD(FULL, lr=torch.nan), "lr of SGD is nan; give a finite number"),
        (torch.optim.SGD(FULL, lr=torch.inf), "lr of SGD is inf"),
        (torch.optim.AdamW(FULL, lr=torch.tensor(torch.inf)), "lr of AdamW is inf"),
        (torch.optim.SGD(FULL, lr=0.1, weight_decay=torch.nan), "weight_decay of SGD is nan"),
        (Grows(FULL, growth=torch.nan), "growth of Grows is nan"),
        (torch.optim.RMSprop(HALF), "eps=1e-08 of RMSprop is 0 in float16, as 1 of its .* eps=1e-"),
        (torch.optim.Adam(HALF, eps=2.9e-8), "eps=2.9e-08 of Adam is 0 in float16"),
        (torch.optim.AdamW(HALF, eps=1e-9), "eps=1e-09 of AdamW is 0 in float16"),
        (Factored(HALF, eps1=1e-30), "eps1=1e-30 of Factored is 0 .* give eps1=1e-4"),
        (Factored(HALF, eps=(1e-3, 1e-9)), r"eps=\(0.001, 1e-09\) of Factored is 0 in float16"),
    ],
)
def test_check_optimizer_refuses_bad_numbers(
    optimizer: torch.optim.Optimizer, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_optimizer(optimizer)


def test_check_optimizer_takes_what_can_train() -> None:
    adafactor = type("Adafactor", (Factored,), {})(HALF, eps=(1e-30, 1e-3))
    for each in (torch.optim.Adam(FULL), torch.optim.Adam(HALF, eps=3e-8), Grows(FULL), adafactor):
        check_optimizer(each)


class Steep(pl.LightningModule):
    """Has a gradient of 40,000 by each of its weights, and a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.count = MeanMetric()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return 40_000 * self.weight.sum() * batch.mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.count.update(batch.mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("limit", [1.0, 100_000.0])
def test_steps_are_clipped_by_norms_that_half_does_not_hold(limit: float) -> None:
    module, loader = Steep(), DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]
    trainer = quiet_trainer(SoundNumerics(), precision="16-true", gradient_clip_val=limit)
    trainer.fit(module, loader, loader)
    expected = min(limit, torch.finfo(torch.float16).max / 2) / 4  # a sixteenth of the square
    assert module.weight.tolist() == pytest.approx([-expected] * 16, rel=2e-3)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_metrics_of_any_module_count_exactly(precision: Any) -> None:
    module, values = Steep(), torch.arange(600.0).remainder(2).view(-1, 1)
    quiet_trainer(SoundNumerics(), precision=precision).validate(
        module,
        DataLoader(values),
        verbose=False,  # type: ignore[arg-type]
    )
    assert {x.dtype for x in module.count.metric_state.values()} == {torch.float32}
    assert (module.count.compute(), module.count.weight) == (0.5, 600)


def test_exact_metrics_takes_lists_and_whole_numbers() -> None:
    class Keeps(MeanMetric):
        pass

    metric = Keeps()
    metric.add_state("seen", default=[], dist_reduce_fx="cat")
    metric.add_state("steps", default=torch.tensor(3), dist_reduce_fx="sum")
    metric.seen.append(torch.tensor([1.0009765625]))  # is 1 in bfloat16
    module = nn.Sequential(metric)
    with exact_metrics(module):
        module.to(torch.bfloat16)
    assert metric.seen[0].item() == 1.0009765625
    assert metric.steps.dtype == torch.int64
    assert metric.dtype == torch.float32

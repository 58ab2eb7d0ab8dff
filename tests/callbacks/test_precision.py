"""Lightning's precisions with swapped norms, on the CPU, as far as torch has them there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import PlModule, make, make_trainer, package_of
from nmlightning import NormSwap
from nmlightning.commands.run_report import SkippedStepCount

NORMS: dict[str, dict[str, Any]] = {
    "l1": {},
    "l1-half": {"stats_dtype": "float16"},
    "linf": {},
    "top10": {},
    "lp": {"p": 3},
    "range": {},
    "mean": {},
    "half_l2": {},
}
OVERFLOW_AT = 2
BATCHES = 4


class HalfInputs(PlModule):
    """Takes its images in its own dtype, as nmlightning's data modules give them."""

    def on_after_batch_transfer(self, batch: list[Tensor], _: int) -> list[Tensor]:
        return [batch[0].to(self.dtype), batch[1]]


def batches(overflow: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8 * BATCHES, 2, 8, 8, generator=generator)
    if overflow:
        images[8 * OVERFLOW_AT] = torch.inf
    labels = torch.randint(3, (len(images),), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def fit(
    module_class: type,
    norm: str | NormSwap,
    precision: str,
    *callbacks: Any,
    overflow: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Any:
    package = package_of(module_class)
    settings: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # on the CPU Lightning would make bf16-mixed of it
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        settings = {"plugins": package.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    swap = NormSwap(norm.split("-")[0], NORMS[norm]) if isinstance(norm, str) else norm
    trainer = make_trainer(module_class, swap, *callbacks, **settings, **options)
    module = make(module_class)
    trainer.fit(module, batches(overflow), batches(False), ckpt_path=ckpt_path)
    return module, trainer


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers() if "running" in name}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true", "bf16-true"])
def test_every_norm_trains_in_every_precision(norm: str, precision: str) -> None:
    before = make(HalfInputs).state_dict()
    module, _ = fit(HalfInputs, norm, precision)
    dtype = {"16-true": torch.float16, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.isfinite().all(), name
    assert not torch.equal(module.net[0].weight.float(), before["net.0.weight"])
    for name, buffer in statistics(module).items():
        assert buffer.dtype == torch.float32, name
        assert buffer.isfinite().all(), name
        assert not torch.equal(buffer, before[name]) or norm == "mean"
    assert module.eval().net(torch.randn(2, 2, 8, 8).to(dtype)).isfinite().all()


class HalfTokens(HalfInputs):
    """Its norms are of tokens: the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.ReLU(),
            nn.RMSNorm(8),
            nn.Flatten(),
            nn.Linear(128, 3),
        )


@pytest.mark.parametrize("options", [{}, {"stats_dtype": "float16"}], ids=str)
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true"])
def test_layer_norms_train_in_every_precision(options: dict[str, Any], precision: str) -> None:
    swap = NormSwap("l1", options, kinds=["layer", "rms"])
    module, _ = fit(HalfTokens, swap, precision)
    assert [type(m).__name__ for m in module.net[1:4:2]] == ["L1LayerNorm", "L1RMSNorm"]
    before = HalfTokens().net[3].weight
    assert all(q.isfinite().all() for q in module.parameters())
    assert not torch.equal(module.net[3].weight.float(), before)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_running_statistics_survive_an_overflow(precision: str) -> None:
    """The batch is left out; with the GradScaler, the step is too."""
    module, _ = fit(HalfInputs, "l1", precision, overflow=True)
    for name, buffer in statistics(module).items():
        assert buffer.dtype == torch.float32, name
        assert buffer.isfinite().all(), name
        assert not torch.equal(buffer, torch.zeros_like(buffer)), name
    if precision == "16-mixed":
        assert all(p.isfinite().all() for p in module.parameters())


def test_skipped_steps_are_counted_through_a_resume(tmp_path: Path) -> None:
    for epochs, start in ((1, None), (2, tmp_path / "last.ckpt")):
        count = SkippedStepCount()
        options = {"max_epochs": epochs, "ckpt_path": start, "overflow": True}
        _, trainer = fit(PlModule, "l1", "16-mixed", count, **options)
        assert trainer.callback_metrics["train/skipped_steps"] == epochs
        trainer.save_checkpoint(tmp_path / "last.ckpt")


def test_without_a_scaler_nothing_is_skipped_or_logged() -> None:
    _, trainer = fit(PlModule, "l1", "32-true", SkippedStepCount())
    assert "train/skipped_steps" not in trainer.callback_metrics

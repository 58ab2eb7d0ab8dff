"""Test the table of what is steered: every convolution and linear layer, once, with the reason."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nmlightning.callbacks import WeightNormTracker
from nmlightning.optim import DecayEquivalentLR, Hyperball, RadialProjection
from recorded_runs import Trains, make_data, make_trainer


class Mixed(pl.LightningModule):
    """Has a convolution for each reason to steer or to leave it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-12)
        self.kept = nn.Conv2d(4, 4, 1)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.other = nn.Conv2d(4, 4, 1)
        self.free = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head.weight

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = self.norm(self.plain(batch)).relu()
        x = self.free(self.other(self.frozen(self.kept(x)))).mean((2, 3))
        loss: Tensor = (self.head(x) + self.tied(x)).logsumexp(1).mean()
        return loss

    def configure_optimizers(self) -> Any:
        held = [q for name, q in self.named_parameters() if not name.startswith("other")]
        return torch.optim.SGD(held, lr=0.01, momentum=0.9)


def read_table(printed: str) -> list[tuple[str, str]]:
    """Return the rows, without the numbers in them."""
    rows = re.findall(r"│ (\S+) +│ (.*?) +│", printed)
    return [(name, re.sub(r"share [^)]*", "share", why)) for name, why in rows]


def fit(tmp_path: Path, steering: Any) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        callbacks=[WeightNormTracker(steering=steering)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Mixed(), DataLoader(torch.randn(8, 2, 5, 5), batch_size=4))  # type: ignore[arg-type]


def test_every_layer_is_there_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fit(tmp_path, DecayEquivalentLR(0.01, exclude=["kept*"]))
    printed = capsys.readouterr().err
    assert "DecayEquivalentLR steers 2 of 7 weights" in printed
    assert read_table(printed) == [
        ("plain.weight", "steered: scale-invariant (radial share)"),
        ("kept.weight", "left: exclude names it"),
        ("frozen.weight", "left: it is frozen, and stays unsteered if it is trained later"),
        ("other.weight", "left: no optimizer has it"),
        ("free.weight", "left: the loss feels its norm (radial share)"),
        ("unused.weight", "steered; it has had no gradient yet"),
        ("head.weight", "left: not a convolution; name it by include"),
    ]


@pytest.mark.filterwarnings("ignore:head.weight is steered, but the loss feels its norm")
def test_layers_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fit(tmp_path, DecayEquivalentLR(0.01, include=["head.weight", "plain.*"]))
    assert read_table(capsys.readouterr().err) == [
        ("plain.weight", "steered: scale-invariant (radial share)"),
        ("kept.weight", "left: include does not name it"),
        ("frozen.weight", "left: it is frozen, and stays unsteered if it is trained later"),
        ("other.weight", "left: no optimizer has it"),
        ("free.weight", "left: include does not name it"),
        ("unused.weight", "left: include does not name it"),
        ("head.weight", "steered, as include asks for: the loss feels its norm (radial share)"),
    ]


@pytest.mark.parametrize("rule", [Hyperball, RadialProjection])
def test_rules_that_steer_any_matrix(
    rule: type[Hyperball | RadialProjection],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fit(tmp_path, rule(exclude=["kept*"]))
    printed = capsys.readouterr().err
    assert f"{rule.__name__} steers 4 of 7 weights" in printed
    assert read_table(printed) == [
        ("plain.weight", "steered"),
        ("kept.weight", "left: exclude names it"),
        ("frozen.weight", "left: it is frozen, and stays unsteered if it is trained later"),
        ("other.weight", "left: no optimizer has it"),
        ("free.weight", "steered"),
        ("unused.weight", "steered"),
        ("head.weight", "steered"),
    ]


def test_each_fit_has_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = WeightNormTracker(steering=DecayEquivalentLR(0.01))
    for number in range(2):
        make_trainer(tmp_path / str(number), tracker).fit(Trains(), make_data())
        assert "DecayEquivalentLR steers 2 of 3 weights" in capsys.readouterr().err

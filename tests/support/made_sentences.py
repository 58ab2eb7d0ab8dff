"""Sentence pairs of many lengths, in files, and runs over them, for the tests of text data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from nmlightning.translation.datamodules import ParallelText
from nmlightning.translation.sources import SentencePair
from trainers import quiet_trainer

WORDS = np.array(["ein", "Haus", "am", "See", "und", "Bäume", "stehen", "da", "viele"])


def make_pairs(length: int, seed: int = 0) -> list[SentencePair]:
    """Return pairs that begin with their row, so that a batch tells what it holds."""
    draw = np.random.default_rng(seed)
    return [
        SentencePair(
            " ".join([str(row), *draw.choice(WORDS, draw.integers(1, 12))]),
            " ".join([str(row), *draw.choice(WORDS, draw.integers(1, 12))]),
        )
        for row in range(length)
    ]


def write_pairs(folder: Path, name: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Write a file of each side and return their paths."""
    files = [folder / f"{name}.{language}" for language in ("de", "en")]
    for path, side in zip(files, zip(*pairs, strict=True), strict=True):
        path.write_text("".join(f"{sentence}\n" for sentence in side), encoding="utf-8")
    return [str(path) for path in files]


def make_text(folder: Path, train: int = 90, val: int = 23, **options: Any) -> ParallelText:
    """Return a data module of made sentences; what it keeps is below the folder, too."""
    settings = {"vocab_size": 300, "tokens_a_batch": 200, "max_length": 100, **options}
    return ParallelText(
        write_pairs(folder, "train", make_pairs(train)),
        write_pairs(folder, "val", make_pairs(val, seed=1)),
        root=str(folder / "data"),
        **settings,
    )


class CountTokens(pl.LightningModule):
    """Learns nothing to speak of, and remembers every training batch by its global step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[int, Tensor] = {}
        self.epochs: list[int] = []
        self.references: list[str] = []

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        self.seen[self.global_step] = torch.cat([batch.source, batch.target], dim=1)
        self.epochs.append(self.current_epoch)
        return self.weight * len(batch.source)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.references.extend(batch.references)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: pl.LightningDataModule, *, seed: int = 1, **options: Any) -> CountTokens:
    """Train for three epochs and return what was seen."""
    pl.seed_everything(seed, verbose=False)
    ckpt_path = options.pop("ckpt_path", None)
    model = CountTokens()
    trainer = quiet_trainer(**{"max_epochs": 3, **options})
    torch.rand(seed)  # what else draws numbers must not matter
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def assert_same(seen: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert list(seen) == list(expected), (list(seen), list(expected))
    for step, tokens in seen.items():
        assert torch.equal(tokens, expected[step]), step

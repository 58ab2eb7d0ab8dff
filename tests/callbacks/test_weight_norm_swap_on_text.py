"""Test WeightNormSwap on an embedding, an LSTM and linear layers."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import make_trainer
from nmlightning import (
    NormSwap,
    WeightNormSwap,
    load_from_checkpoint,
    remove_weight_norm,
)

WORDS = 9


class Words(pl.LightningModule):
    """Says which token follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=True)
        self.norm = nn.RMSNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.output = nn.Linear(6, WORDS, bias=False)
        self.output.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.norm(self.lstm(self.words(x))[0])))  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        logits = self(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val/loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def sentences() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randint(1, WORDS, (12, 5), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x), batch_size=3)


def fit(*callbacks: Any, ckpt_path: Any = None, **options: Any) -> tuple[Words, Any]:
    module = Words()
    trainer = make_trainer(Words, *callbacks, accumulate_grad_batches=2, **options)
    trainer.fit(module, sentences(), sentences(), ckpt_path=ckpt_path)
    return module, trainer


def swaps() -> list[Any]:
    layers = ["embedding", "recurrent", "linear"]
    return [NormSwap("l1", kinds=["rms"]), WeightNormSwap(layers=layers)]


def test_translator_with_weight_norm_resumes_and_loads_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = fit(*swaps(), max_epochs=2)
    _, trainer = fit(*swaps())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, trainer = fit(*swaps(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    loaded = load_from_checkpoint(Words, tmp_path / "b.ckpt").eval()
    x = sentences().dataset[0][0][None]
    expected = resumed.eval()(x)
    assert torch.equal(loaded(x), expected)
    remove_weight_norm(loaded)
    assert torch.equal(loaded(x), expected)
    assert loaded.words.weight is loaded.output.weight

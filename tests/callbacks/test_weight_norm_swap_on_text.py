"""Test WeightNormSwap and WeightNormTracker on an embedding, an LSTM and linear layers."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import make_trainer
from nmlightning import (
    NormHistory,
    NormSwap,
    WeightNormSwap,
    WeightNormTracker,
    load_from_checkpoint,
    remove_weight_norm,
)
from nmlightning.weights.recording_file import FILE_NAME

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


def swaps(**options: Any) -> list[Any]:
    layers = ["embedding", "recurrent", "linear"]
    return [NormSwap("l1", kinds=["rms"]), WeightNormSwap(layers=layers, **options)]


def test_translator_with_weight_norm_resumes_and_loads_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = fit(*swaps(), max_epochs=2)
    _, trainer = fit(*swaps())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, trainer = fit(*swaps(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    loaded = load_from_checkpoint(Words, tmp_path / "b.ckpt").eval()
    x = sentences().dataset[0][0][None]
    expected = resumed.eval()(x)
    assert torch.equal(loaded(x), expected)
    remove_weight_norm(loaded)
    assert torch.equal(loaded(x), expected)
    assert loaded.words.weight is loaded.output.weight


def test_tracker_records_all_normalised_weights_of_a_translator(tmp_path: Path) -> None:
    rows = {"lstm.weight_ih_l0": 24, "lstm.weight_hh_l1": 24, "hidden.weight": 6}
    options = {"include": ["output.weight"], "rho": 2.0}
    fit(*swaps(**options), WeightNormTracker(), default_root_dir=tmp_path)
    (file,) = tmp_path.rglob(FILE_NAME)
    norms = NormHistory.load(file).norms
    for name, count in rows.items():
        assert norms[name].shape[1] == count
        torch.testing.assert_close(torch.from_numpy(norms[name]), torch.full((2, count), 2.0))
        assert f"{name}_v" in norms
    assert (norms["words.weight"][:, 0] == 0).all()  # the padding's
    assert (norms["words.weight_v"][-1] > 0).sum() == WORDS - 1

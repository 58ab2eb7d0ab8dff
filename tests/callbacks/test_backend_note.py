"""Test that NormSwap says which backend the norms take, from what they really get."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import PlModule, UnifiedModule, make_trainer
from nmlightning.callbacks import NormSwap
from nmlightning.callbacks.norm_swap import BackendNote
from nmlightning.kernels import norm_backend
from nmlightning.norms import L1BatchNorm2d, L1LayerNorm, MeanOnlyBatchNorm2d


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def lines_of(model: nn.Module, x: Tensor) -> list[str]:
    """Return what is said of a model's norms after one forward pass, by the formula."""
    layers = {name: layer for name, layer in model.named_modules() if "Norm" in str(type(layer))}
    note = BackendNote(model, layers)
    with norm_backend("formula"):
        model(x)
        model(x)
    return note.describe()


def test_it_counts_the_layers_by_class_dtype_and_layout() -> None:
    first, again = L1BatchNorm2d(3), L1BatchNorm2d(3)
    model = nn.Sequential(first, again, ChannelsLast(), MeanOnlyBatchNorm2d(3), L1BatchNorm2d(3))
    assert lines_of(model, torch.randn(4, 3, 5, 5)) == [
        "2 L1BatchNorm2d by the formula (float32, NCHW): asked for",
        "1 MeanOnlyBatchNorm2d by the formula (float32, NHWC): no kernels for this norm",
        "1 L1BatchNorm2d by the formula (float32, NHWC): asked for",
    ]
    assert not first._forward_pre_hooks


def test_it_names_tokens_and_strides() -> None:
    tokens = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    strided = torch.randn(8, 3, 2, dtype=torch.bfloat16).transpose(0, 2)
    (line,) = lines_of(L1LayerNorm(8), tokens)
    assert line == "1 L1LayerNorm by the formula (bfloat16, contiguous): asked for"
    assert "(bfloat16, strided)" in lines_of(L1LayerNorm(8), strided)[0]


def test_a_compiled_model_is_not_asked() -> None:
    inner = nn.Sequential(L1BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(inner)
    inner.compile(backend="eager")
    assert lines_of(model, torch.randn(4, 3, 5, 5)) == ["1 L1BatchNorm2d by the formula, compiled"]
    assert not inner[0]._forward_pre_hooks


@pytest.mark.parametrize("module_class", [PlModule, UnifiedModule])
def test_norm_swap_says_it_once_in_a_fit(
    module_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = DataLoader(TensorDataset(torch.randn(8, 2, 6, 6), torch.zeros(8).long()), 4)
    module = module_class()
    trainer = make_trainer(module_class, NormSwap("l1"), max_epochs=2)
    with caplog.at_level(logging.INFO):
        trainer.fit(module, batches, batches)
    said = [record.getMessage() for record in caplog.records if " by " in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("NormSwap: 2 L1BatchNorm2d by ")
    assert "(float32, NCHW)" in said[0]

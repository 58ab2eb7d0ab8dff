"""Compiled networks and channels_last in a real Trainer: as without, with the same checkpoints."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from nmlightning import load_from_checkpoint
from nmlightning.callbacks import NormSwap, WeightNormTracker
from nmlightning.cli import main
from nmlightning.datamodules.digits import Digits
from nmlightning.tasks.classification import ImageClassifier
from trainers import quiet_trainer


def fit(folder: Path, ckpt_path: Path | None = None, epochs: int = 1, **options: Any) -> pl.Trainer:
    pl.seed_everything(1, verbose=False)
    trainer = quiet_trainer(
        *(NormSwap("l1"), WeightNormTracker()),
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=1,
        default_root_dir=folder,
    )
    trainer.fit(make_task(**options), Digits(32, image_size=8), ckpt_path=ckpt_path)
    return trainer


def make_task(**options: Any) -> ImageClassifier:
    return ImageClassifier(make_net(), sgd, **options)


def make_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
    )


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let networks be traced and differentiated, but not translated, which takes a minute."""
    modes, compile_in_place = [], nn.Module.compile

    def trace(self: nn.Module, mode: str, dynamic: bool) -> None:
        modes.append(mode)
        compile_in_place(self, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", trace)
    torch.compiler.reset()
    return modes


def announced(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [m for m in caplog.messages if m.startswith("ImageClassifier: ")]


# What torch 2.11's compiler does with autograd functions and inputs, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_run_equals_the_eager_one(
    tmp_path: Path, traced: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    eager = fit(tmp_path / "eager", epochs=2)
    assert not announced(caplog)
    with caplog.at_level(logging.INFO):
        half = fit(tmp_path / "half", compile="default")
    assert traced == ["default"]
    told = announced(caplog)
    assert [line.rpartition("took")[0] or line for line in told] == [
        "ImageClassifier: compiling the network for evaluation: the first step takes a minute or "
        "more.",
        "ImageClassifier: the first step of evaluation, compiled, ",
        "ImageClassifier: compiling the network for training: the first step takes a minute or "
        "more.",
        "ImageClassifier: the first step of training, compiled, ",
    ]
    path = tmp_path / "half.ckpt"
    half.save_checkpoint(path)
    whole = fit(tmp_path / "whole", path, epochs=2, compile="default")
    for name, value in eager.callback_metrics.items():
        # Four steps in float32, whose sums are in another order.
        torch.testing.assert_close(whole.callback_metrics[name], value, rtol=1e-3, atol=1e-4)
    loaded = load_from_checkpoint(ImageClassifier, path, net=make_net(), optimizer=sgd)
    assert loaded.compile_mode == "default"
    assert set(loaded.state_dict()) == set(eager.lightning_module.state_dict())
    assert type(loaded.net[1]).__name__ == "L1BatchNorm2d"


def test_a_fit_compiles_one_graph_for_each_size_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, compile_in_place = [], nn.Module.compile

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        images = [
            q for q in inputs if isinstance(q, Tensor) and q.shape[-1:] == (8,) and q.dim() > 2
        ]
        sizes.extend(str(q.shape[0]) for q in images)
        return graph.forward

    def trace(self: nn.Module, mode: str, **options: Any) -> None:
        compile_in_place(self, backend=count, **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    torch.compiler.reset()
    task, data = make_task(compile="default"), Digits(32, image_size=8)
    limits = {"limit_train_batches": 2, "limit_val_batches": 1.0}
    quiet_trainer(NormSwap("l1"), max_epochs=2, **limits).fit(task, data)
    assert sizes == ["32", "32", str(len(data.validation.labels) % 32)]  # else with symbols


def test_channels_last_run_equals_the_plain_one(tmp_path: Path) -> None:
    layouts: list[bool] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    plain = fit(tmp_path / "plain")
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: look(module, inputs) if isinstance(module, nn.Conv2d) else None
    )
    try:
        turned = fit(tmp_path / "turned", channels_last=True)
    finally:
        handle.remove()
    assert layouts
    assert all(layouts)
    weight = turned.lightning_module.net[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    for name, value in plain.callback_metrics.items():
        # Two steps in float32, by other kernels.
        torch.testing.assert_close(turned.callback_metrics[name], value, rtol=1e-3, atol=1e-4)
    turned.save_checkpoint(tmp_path / "last.ckpt")
    task = copy.deepcopy(plain.lightning_module)
    task.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])


@pytest.mark.slow
def test_quickstart_compiles(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    keys = {"compile": "default", "channels_last": "true", "net.depth": "8"}
    words = [word for key, value in keys.items() for word in (f"--model.{key}", value)]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    with caplog.at_level(logging.INFO):
        assert not main(["fit", "--config", "quickstart", *words, *limits])
    for stage in ("training", "evaluation"):
        assert f"the first step of {stage}, compiled, took" in caplog.text

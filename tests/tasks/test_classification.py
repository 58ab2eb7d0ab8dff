"""ImageClassifier in a real Trainer: what it logs, how it decays, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

from nmlightning.callbacks.norm_swap import NormSwap
from nmlightning.datamodules.digits import Digits
from nmlightning.errors import InputError
from nmlightning.tasks.classification import ImageClassifier


def make_task(net: nn.Module | None = None, **options: Any) -> ImageClassifier:
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return ImageClassifier(net, **{"optimizer": sgd, **options})


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)


def make_trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**quiet, **options})


@pytest.fixture
def digits() -> Digits:
    return Digits(batch_size=200, image_size=8, channels=1)


class Fixed(nn.Module):
    """Returns its input: the test chooses the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + 0 * self.unused


def test_learns_the_digits(digits: Digits) -> None:
    trainer = make_trainer(max_epochs=5)
    trainer.fit(make_task(), digits)
    metrics = trainer.callback_metrics
    assert set(metrics) == {"train/loss", "train/top1", "val/loss", "val/top1", "val/top5"}
    assert metrics["val/top1"] > 0.8
    assert metrics["val/top1"] < metrics["val/top5"] <= 1


@pytest.mark.parametrize("classes", [3, 7])
def test_metrics_are_those_of_all_images_whatever_the_batches(classes: int) -> None:
    logits, labels = torch.randn(25, classes), torch.randint(classes, (25,))
    pairs = list(zip(logits, labels, strict=True))
    loader = DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]
    (result,) = make_trainer().test(make_task(Fixed()), loader, verbose=False)
    ranked = logits.argsort(dim=1, descending=True)
    hits = ranked == labels[:, None]
    assert result == {
        "test/loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5),
        "test/top1": pytest.approx(hits[:, 0].float().mean().item()),
        "test/top5": pytest.approx(hits[:, :5].any(dim=1).float().mean().item()),
    }


def test_an_epochs_means_are_logged_once_and_are_of_the_whole_epoch(monkeypatch: Any) -> None:
    logits, labels = torch.randn(25, 4), torch.randint(4, (25,))
    loader = DataLoader(list(zip(logits, labels, strict=True)), batch_size=8)  # type: ignore[arg-type]
    task, logged = make_task(Fixed()), []
    log = task.log
    monkeypatch.setattr(
        task, "log", lambda name, *args, **kwargs: (logged.append(name), log(name, *args, **kwargs))
    )
    trainer = make_trainer(max_epochs=2, val_check_interval=2)  # validates in mid-epoch, too
    trainer.fit(task, loader, loader)
    expected = F.cross_entropy(logits, labels)
    hits = (logits.argmax(1) == labels).float().mean()
    for stage in ("train", "val"):
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/loss"], expected)
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/top1"], hits)
        epochs = {"train": 2, "val": 5}[stage]  # with the sanity check before the first
        assert logged.count(f"{stage}/loss") == logged.count(f"{stage}/top1") == epochs


def test_smoothing_is_for_training_only() -> None:
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    loader = DataLoader(list(zip(logits, labels, strict=True)), batch_size=8)  # type: ignore[arg-type]
    trainer = make_trainer()
    trainer.fit(make_task(Fixed(), label_smoothing=0.3), loader, loader)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], smoothed)
    torch.testing.assert_close(
        trainer.callback_metrics["val/loss"], F.cross_entropy(logits, labels)
    )


def test_predicts_probabilities(digits: Digits) -> None:
    trainer, task = make_trainer(), make_task()
    batches = trainer.predict(task, digits)
    assert batches is not None
    assert torch.cat(batches).shape == (360, 10)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(batches).sum(1), torch.ones(360))  # type: ignore[arg-type]
    assert task.predict_step(torch.zeros(3, 1, 8, 8), 0).shape == (3, 10)


@pytest.mark.parametrize(
    ("scope", "decays"), [("all", [5e-4]), ("no_norm", [5e-4, 0.0]), ("last_layer", [5e-4, 0.0])]
)
def test_decay_is_the_optimizers_own(scope: Any, decays: list[float]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = make_task(net, weight_decay_scope=scope).configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


def test_milestones_are_epochs(digits: Digits) -> None:
    rates = []

    class Rates(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = make_task(lr_scheduler=lambda optimizer: MultiStepLR(optimizer, [1, 2]))
    make_trainer(max_epochs=3, callbacks=[Rates()]).fit(task, digits)
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_plateau_watches_the_validation_loss(digits: Digits) -> None:
    task = make_task(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = make_trainer()
    trainer.fit(task, digits)
    assert trainer.lr_scheduler_configs[0].monitor == "val/loss"


def test_compiles_once_after_the_callbacks(digits: Digits, monkeypatch: Any) -> None:
    events: list[str] = []

    class Swap(pl.Callback):
        def setup(self, *_: object, **__: object) -> None:
            events.append("swap")

    task = make_task(compile="reduce-overhead")
    keys = set(task.state_dict())
    monkeypatch.setattr(task.net, "compile", lambda mode: events.append(mode))
    trainer = make_trainer(callbacks=[Swap()])
    trainer.fit(task, digits)
    trainer.validate(task, digits, verbose=False)
    assert events == ["swap", "reduce-overhead", "swap"]
    assert set(task.state_dict()) == keys


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_the_data_follow_a_true_precision(digits: Digits, precision: Any) -> None:
    trainer = make_trainer(precision=precision)
    trainer.fit(make_task(), digits)
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_nan_is_logged_and_stops_nothing() -> None:
    loader = DataLoader([(torch.full((4,), torch.nan), torch.tensor(1))], batch_size=1)  # type: ignore[arg-type]
    trainer = make_trainer()
    trainer.fit(make_task(Fixed()), loader, loader)
    assert trainer.callback_metrics["train/loss"].isnan()


def test_another_number_of_outputs_is_refused(digits: Digits) -> None:
    task = make_task(nn.Sequential(nn.Flatten(), nn.Linear(64, 11)))
    message = "Sequential has 11 outputs, but Digits has 10 classes: set the network's num_classes"
    with pytest.raises(InputError, match=message):
        make_trainer().fit(task, digits)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    pairs = [(torch.zeros(4), torch.tensor(0)), (torch.zeros(4), torch.tensor(label))]
    message = (
        rf"labels go from {min(label, 0)} to {max(label, 0)}, but Fixed tells the classes 0 to 3"
    )
    with pytest.raises(InputError, match=message):
        make_trainer().validate(make_task(Fixed()), DataLoader(pairs, batch_size=2), verbose=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan"), "0.1", None])
def test_a_smoothing_out_of_range_is_refused(smoothing: Any) -> None:
    with pytest.raises(InputError, match="label_smoothing must be at least 0 and less than 1"):
        make_task(label_smoothing=smoothing)


def test_a_resume_without_the_swap_is_refused(digits: Digits, tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))

    path = tmp_path / "last.ckpt"
    trainer = make_trainer(callbacks=[NormSwap("l1")])
    trainer.fit(make_task(plain()), digits)
    trainer.save_checkpoint(path)
    with pytest.raises(InputError, match=r"trained with NormSwap 'l1', this run has nothing"):
        make_trainer().fit(make_task(plain()), digits, ckpt_path=path)
    ImageClassifier.load_from_checkpoint(path, net=plain(), optimizer=sgd)


def test_a_checkpoint_made_in_python_restores(digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    task, trainer = make_task(label_smoothing=0.1), make_trainer()
    trainer.fit(task, digits)
    trainer.save_checkpoint(path)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    restored = ImageClassifier.load_from_checkpoint(path, net=net, optimizer=sgd)
    assert restored.label_smoothing == 0.1
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(restored.parameters(), task.parameters(), strict=True)
    )

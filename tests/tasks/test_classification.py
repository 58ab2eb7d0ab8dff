"""ImageClassifier in a real Trainer: what it logs, decays and refuses; MeanLoss; sharded blocks."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

from nmlightning.datamodules.digits import Digits
from nmlightning.errors import InputError
from nmlightning.models import VGG, CifarResNet, ResNet50
from nmlightning.parametrizations import apply_weight_norm
from nmlightning.reports.run import read_csv_file
from nmlightning.tasks import classification
from nmlightning.tasks.classification import ImageClassifier, MeanLoss, shard_blocks
from trainers import quiet_trainer


def make_task(net: nn.Module | None = None, **options: Any) -> ImageClassifier:
    net = net or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return ImageClassifier(net, **{"optimizer": sgd, **options})


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)


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


def test_classifier_learns_the_digits(digits: Digits) -> None:
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(make_task(), digits)
    metrics = trainer.callback_metrics
    assert set(metrics) == {"train/loss", "train/top1", "val/loss", "val/top1", "val/top5"}
    assert metrics["val/top1"] > 0.8
    assert metrics["val/top1"] < metrics["val/top5"] <= 1


def test_classifier_overfits_batches_in_one_order(digits: Digits) -> None:
    trainer = quiet_trainer(overfit_batches=1)
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        trainer.fit(make_task(), digits)
    assert not trainer.train_dataloader.sampler.shuffle  # type: ignore[union-attr]


def test_classifier_is_fitted_after_it_was_validated(digits: Digits) -> None:
    task, trainer = make_task(), quiet_trainer()
    quiet_trainer().validate(task, digits, verbose=False)
    trainer.fit(task, digits)
    assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize("classes", [3, 7])
def test_classifier_metrics_are_of_all_images(classes: int) -> None:
    logits, labels = torch.randn(25, classes), torch.randint(classes, (25,))
    pairs = list(zip(logits, labels, strict=True))
    loader = DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]
    (result,) = quiet_trainer().test(make_task(Fixed()), loader, verbose=False)
    ranked = logits.argsort(dim=1, descending=True)
    hits = ranked == labels[:, None]
    assert result == {
        "test/loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5),
        "test/top1": pytest.approx(hits[:, 0].float().mean().item()),
        "test/top5": pytest.approx(hits[:, :5].any(dim=1).float().mean().item()),
    }


def test_classifier_logs_means_once_an_epoch(monkeypatch: Any) -> None:
    logits, labels = torch.randn(25, 4), torch.randint(4, (25,))
    loader = DataLoader(list(zip(logits, labels, strict=True)), batch_size=8)  # type: ignore[arg-type]
    task, logged = make_task(Fixed()), []
    log = task.log
    monkeypatch.setattr(
        task, "log", lambda name, *args, **kwargs: (logged.append(name), log(name, *args, **kwargs))
    )
    trainer = quiet_trainer(max_epochs=2, val_check_interval=2)  # validates in mid-epoch, too
    trainer.fit(task, loader, loader)
    expected = F.cross_entropy(logits, labels)
    hits = (logits.argmax(1) == labels).float().mean()
    for stage in ("train", "val"):
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/loss"], expected)
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/top1"], hits)
        epochs = {"train": 2, "val": 5}[stage]  # with the sanity check before the first
        assert logged.count(f"{stage}/loss") == logged.count(f"{stage}/top1") == epochs


def test_classifier_logs_the_loss_of_a_batch_when_the_loggers_do(
    digits: Digits, tmp_path: Path
) -> None:
    losses: list[float] = []
    keep = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, outputs, *_: losses.append(
            float(outputs["loss"])
        )
    )
    options = {"max_epochs": 2, "limit_train_batches": 6, "accumulate_grad_batches": 2}
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = quiet_trainer(keep, logger=logger, log_every_n_steps=3, **options)
    trainer.fit(make_task(), digits)
    points = [p for p in read_csv_file(Path(logger.log_dir, "metrics.csv")) if "_step" in p.tag]
    assert {p.tag for p in points} == {"train/loss_step"}
    assert {p.step: p.value for p in points} == pytest.approx({2: 2 * losses[5], 5: 2 * losses[11]})


def test_classifier_smooths_labels_in_training_only() -> None:
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    loader = DataLoader(list(zip(logits, labels, strict=True)), batch_size=8)  # type: ignore[arg-type]
    trainer = quiet_trainer()
    trainer.fit(make_task(Fixed(), label_smoothing=0.3), loader, loader)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], smoothed)
    torch.testing.assert_close(
        trainer.callback_metrics["val/loss"], F.cross_entropy(logits, labels)
    )


def test_classifier_predicts_probabilities(digits: Digits) -> None:
    trainer, task = quiet_trainer(), make_task()
    batches = trainer.predict(task, digits)
    assert torch.cat(batches).shape == (360, 10)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.cat(batches).sum(1), torch.ones(360))  # type: ignore[arg-type]
    assert task.predict_step(torch.zeros(3, 1, 8, 8), 0).shape == (3, 10)


@pytest.mark.parametrize(
    ("scope", "decays"), [("all", [5e-4]), ("no_norm", [5e-4, 0.0]), ("last_layer", [5e-4, 0.0])]
)
def test_classifier_decay_is_the_optimizers(scope: Any, decays: list[float]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = make_task(net, weight_decay_scope=scope).configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


def test_classifier_milestones_are_epochs(digits: Digits) -> None:
    rates = []

    class Rates(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    task = make_task(lr_scheduler=lambda optimizer: MultiStepLR(optimizer, [1, 2]))
    quiet_trainer(Rates(), max_epochs=3).fit(task, digits)
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_classifier_plateau_watches_the_validation_loss(digits: Digits) -> None:
    task = make_task(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = quiet_trainer()
    trainer.fit(task, digits)
    assert trainer.lr_scheduler_configs[0].monitor == "val/loss"


def test_classifier_compiles_once_after_the_callbacks(digits: Digits, monkeypatch: Any) -> None:
    events: list[str] = []

    class Swap(pl.Callback):
        def setup(self, *_: object, **__: object) -> None:
            events.append("swap")

    task = make_task(compile="reduce-overhead")
    keys = set(task.state_dict())
    monkeypatch.setattr(task.net, "compile", lambda mode, dynamic: events.append(mode))
    trainer = quiet_trainer(Swap())
    trainer.fit(task, digits)
    trainer.validate(task, digits, verbose=False)
    assert events == ["swap", "reduce-overhead", "swap"]
    assert set(task.state_dict()) == keys


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_classifier_trains_in_a_true_precision(digits: Digits, precision: Any) -> None:
    trainer = quiet_trainer(precision=precision)
    trainer.fit(make_task(), digits)
    assert trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_classifier_counts_exactly_in_half(precision: Any) -> None:
    logits = torch.randn(40_000, 10).bfloat16().float()
    loader = DataLoader(TensorDataset(logits, torch.randint(10, (40_000,))), batch_size=100)
    (exact,) = quiet_trainer().validate(make_task(Fixed()), loader, verbose=False)
    trainer = quiet_trainer(precision=precision)
    (half,) = trainer.validate(make_task(Fixed()), loader, verbose=False)
    assert half == pytest.approx(exact, rel=1e-5)


def test_classifier_refuses_another_number_of_outputs(digits: Digits) -> None:
    task = make_task(nn.Sequential(nn.Flatten(), nn.Linear(64, 11)))
    message = "Sequential has 11 outputs, but Digits has 10 classes: set the network's num_classes"
    with pytest.raises(InputError, match=message):
        quiet_trainer().fit(task, digits)


@pytest.mark.parametrize("label", [-1, 4])
def test_classifier_refuses_a_label_out_of_range(label: int) -> None:
    pairs = [(torch.zeros(4), torch.tensor(0)), (torch.zeros(4), torch.tensor(label))]
    message = (
        rf"labels go from {min(label, 0)} to {max(label, 0)}, but Fixed has the classes 0 to 3"
    )
    with pytest.raises(InputError, match=message):
        quiet_trainer().validate(make_task(Fixed()), DataLoader(pairs, batch_size=2), verbose=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan"), "0.1", None])
def test_classifier_refuses_a_smoothing_out_of_range(smoothing: Any) -> None:
    with pytest.raises(InputError, match="label_smoothing must be at least 0 and less than 1"):
        make_task(label_smoothing=smoothing)
    with pytest.raises(InputError, match=r"fast is None or 'auto', got 'aut'\. Did you mean"):
        make_task(fast="aut")
    with pytest.raises(InputError, match="channels_last is True or False, got 'yes'"):
        make_task(channels_last="yes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_loss_is_the_mean_over_images(dtype: torch.dtype) -> None:
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


class Mesh:
    """As Lightning's ModelParallelStrategy makes it, without any process."""

    def __init__(self, size: int, split: int = 1) -> None:
        self.of = {"tensor_parallel": split, "data_parallel": size // split}
        self.size = lambda: size

    def __getitem__(self, name: str) -> "Mesh":
        return Mesh(self.of[name])


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that `fully_shard` was called with, in order."""
    calls: list[nn.Module] = []
    monkeypatch.setattr(classification, "fully_shard", lambda module, mesh: calls.append(module))
    return calls


RESIDUAL = [f"layer{stage}.{block}" for stage in (3, 2, 1) for block in (1, 0)]

NESTED = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("net", "names"),
    [
        (CifarResNet(14), [*RESIDUAL, ""]),
        (VGG(11), [""]),
        (NESTED, ["0.0", "0", ""]),
        (nn.Linear(2, 2), [""]),
    ],
    ids=["resnet", "vgg", "nested", "linear"],
)
def test_shard_blocks_shards_inner_blocks_first(
    net: nn.Module, names: list[str], sharded: list[nn.Module]
) -> None:
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    found = {module: name for name, module in net.named_modules()}
    assert [found[module] for module in sharded] == names


def test_shard_blocks_finds_16_blocks_of_resnet50(sharded: list[nn.Module]) -> None:
    net = ResNet50()
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    sizes = [sum(q.numel() for q in block.parameters()) for block in sharded[:-1]]
    assert (len(sizes), max(sizes), sum(sizes)) == (16, 6_039_552, 23_498_496)  # docs/scale.md


def test_shard_blocks_skips_normalised_weights(sharded: list[nn.Module]) -> None:
    net: Any = CifarResNet(8)
    apply_weight_norm(net, "bounded")
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    assert net.layer1[0] in sharded
    assert net.conv1 not in sharded


def test_shard_blocks_refuses_to_split_tensors() -> None:
    with pytest.raises(InputError, match=r"data_parallel_size of .* here 4, and a"):
        shard_blocks(nn.Linear(2, 2), Mesh(4, split=2))  # type: ignore[arg-type]

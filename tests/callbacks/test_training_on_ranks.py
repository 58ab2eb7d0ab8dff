"""Test what holds on two ranks: strategy × precision × train, checkpoint, resume and steer.

Two ranks share the batches that one process sees. They end where it does, up to the rounding of
their precision, and a resumed run ends in exactly the bits of the uninterrupted one.

Run as a script it is one of the ranks: `python test_training_on_ranks.py FOLDER REFERENCE`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn

from nmlightning import load_from_checkpoint
from nmlightning.callbacks import NormSwap, WeightNormTracker
from nmlightning.datamodules import Digits
from nmlightning.norms.batch_norm import L1BatchNorm2d
from nmlightning.optim import LRCorrection, StepRule
from nmlightning.tasks import ImageClassifier
from nmlightning.weights.history import NormHistory
from trainers import quiet_trainer, run_as_script

EPOCHS = 2
STEPS = 2  # an epoch
STRATEGIES = ("ddp", "fsdp2")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
RULES: dict[str, Any] = {"none": None, "LRCorrection": LRCorrection}
RUNS = [(precision, rule) for precision in PRECISIONS for rule in RULES]
HOLDS = [(strategy, *run) for strategy in STRATEGIES for run in RUNS]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(first, second, 3, bias=False), nn.BatchNorm2d(second), nn.ReLU())
        for first, second in ((1, 8), (8, 16))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def make_optimizer(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def make_strategy(kind: str) -> Any:
    if kind == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return {"one": "auto"}.get(kind, kind)


def train(
    folder: Path, kind: str, precision: str, steering: StepRule | None, epochs: int = EPOCHS
) -> None:
    """Train, or resume from the checkpoint in the folder, and leave one there."""
    ranks, last = 1 if kind == "one" else 2, folder / "last.ckpt"
    trainer = quiet_trainer(
        NormSwap("l1"),
        WeightNormTracker(every=1, steering=steering, other_run=True),
        strategy=make_strategy(kind),
        devices=ranks,
        precision=precision,
        sync_batchnorm=True,
        max_epochs=epochs,
        limit_train_batches=STEPS,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    data = Digits(batch_size=16 // ranks, image_size=8, channels=1)
    pl.seed_everything(0, verbose=False)
    trainer.fit(
        ImageClassifier(make_net(), make_optimizer), data, ckpt_path=last if last.exists() else None
    )
    trainer.save_checkpoint(last)


def train_all(folder: Path, reference: Path, kind: str) -> None:
    """Train each run at once; on ranks also in two parts."""
    for precision, rule in RUNS:
        place = folder / kind / precision / rule
        steering = RULES[rule] and RULES[rule](reference)
        train(place / "whole", kind, precision, steering)
        for epochs in () if kind == "one" else (1, EPOCHS):
            train(place / "resumed", kind, precision, steering, epochs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording whose norms are those of the beginning, shrunk."""
    folder = tmp_path_factory.mktemp("reference")
    train(folder, "one", "32-true", None)
    recorded = NormHistory.load(folder)
    norms = {
        name: values[:1].repeat(len(recorded), 0) * 0.9 for name, values in recorded.norms.items()
    }
    NormHistory.from_arrays(norms, recorded.steps, recorded.epochs).save(
        folder / "shrunk" / "weight_norms.safetensors"
    )
    return folder / "shrunk"


@pytest.fixture(scope="module")
def one_process(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_all(folder, reference, "one")
    return folder


@pytest.fixture(scope="module")
def two_ranks(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which one start of two processes trains."""
    folder = tmp_path_factory.mktemp("two")
    run_as_script(__file__, folder, reference)
    return folder


def load(*place: Path | str) -> Any:
    return torch.load(Path(*place, "last.ckpt"), weights_only=True)


def all_weights(checkpoint: Any) -> Tensor:
    """Return all that was learned and the running statistics, in one vector."""
    return torch.cat([v.flatten().double() for v in checkpoint["state_dict"].values()])


TABLE = pytest.mark.parametrize(("strategy", "precision", "rule"), HOLDS)


@TABLE
def test_train_and_steer_as_one_process(
    strategy: str, precision: str, rule: str, two_ranks: Path, one_process: Path
) -> None:
    two = all_weights(load(two_ranks, strategy, precision, rule, "whole"))
    exact, one = (
        all_weights(load(one_process, "one", p, rule, "whole")) for p in ("32-true", precision)
    )
    if precision == "32-true":
        # Sums over two ranks round differently from one sum, over four steps.
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    else:
        # One process rounds as much, only otherwise.
        assert (two - exact).norm() < 1.5 * (one - exact).norm()


@TABLE
def test_record_as_one_process(
    strategy: str, precision: str, rule: str, two_ranks: Path, one_process: Path
) -> None:
    one, two, resumed = (
        NormHistory.load(folder / precision / rule / part)
        for folder, part in (
            (one_process / "one", "whole"),
            (two_ranks / strategy, "whole"),
            (two_ranks / strategy, "resumed"),
        )
    )
    assert two.provenance["world_size"] == 2
    assert two.steps.tolist() == resumed.steps.tolist() == list(range(STEPS * EPOCHS + 1))
    for name, norms in one.norms.items():
        tolerance = 1e-5 if precision == "32-true" else 2**-6
        np.testing.assert_allclose(two.norms[name], norms, rtol=tolerance)
        np.testing.assert_array_equal(resumed.norms[name], two.norms[name])


@TABLE
def test_resume_to_the_same_bits(strategy: str, precision: str, rule: str, two_ranks: Path) -> None:
    whole, resumed = (
        load(two_ranks, strategy, precision, rule, part) for part in ("whole", "resumed")
    )
    assert (resumed["epoch"], resumed["global_step"]) == (EPOCHS, STEPS * EPOCHS)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)


@TABLE
def test_checkpoint_the_whole_network(
    strategy: str, precision: str, rule: str, two_ranks: Path
) -> None:
    """One process loads it without a Trainer, and with nothing that two ranks added."""
    file = two_ranks / strategy / precision / rule / "whole" / "last.ckpt"
    net, stored = make_net(), load(file.parent)["state_dict"]
    module = load_from_checkpoint(ImageClassifier, file, net=net, optimizer=make_optimizer)
    assert [type(net[i][1]) for i in (0, 1)] == [L1BatchNorm2d] * 2
    assert list(module.state_dict()) == list(stored)
    for name, value in module.state_dict().items():
        assert torch.equal(value.to(stored[name].dtype), stored[name])


def test_float16_under_fsdp2_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"not support .*'16-mixed'.* 32-true, bf16-mixed, bf16-tr"
    ):
        quiet_trainer(devices=2, strategy=make_strategy("fsdp2"), precision="16-mixed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in STRATEGIES:
        train_all(Path(sys.argv[1]), Path(sys.argv[2]), each)

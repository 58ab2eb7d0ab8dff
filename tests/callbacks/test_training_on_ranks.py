"""Test what holds on two ranks: strategy × precision × train, checkpoint, resume, steer, log.

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
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import StepLR

import optim_rules
from nmlightning import load_from_checkpoint
from nmlightning.callbacks import Int8Swap, NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.datamodules import Digits
from nmlightning.norms.batch_norm import L1BatchNorm2d
from nmlightning.reports.run import read_run
from nmlightning.tasks import ImageClassifier
from nmlightning.weights.history import NormHistory
from scripts import run_python
from trainers import quiet_trainer

EPOCHS = 2
STEPS = 2  # an epoch
pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")
STRATEGIES = ("ddp", "fsdp2")
RULES = {"none": lambda _: None, **optim_rules.RULES}
WEIGHT_NORMS: dict[str, dict[str, Any]] = {
    "bounded": {},
    "projected": {"p": 1, "project": True},
    "weight": {"kind": "weight", "include": ["net.*.weight"]},
    "gains": {"gain": "channel", "p": "inf"},
}
RUNS = [("bf16-mixed", "stable"), ("bf16-true", "stable")]
RUNS += [("32-true", run) for run in (*RULES, *WEIGHT_NORMS, "int8")]
HOLDS = [(strategy, *run) for strategy in STRATEGIES for run in RUNS]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(first, second, 3, bias=False), nn.BatchNorm2d(second), nn.ReLU())
        for first, second in ((1, 8), (8, 15))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(15, 10))


def make_optimizer(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def make_scheduler(optimizer: torch.optim.Optimizer) -> StepLR:
    return StepLR(optimizer, 1, 0.5)


def make_strategy(kind: str) -> Any:
    if kind == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return {"one": "auto"}.get(kind, kind)


def train(
    folder: Path, kind: str, precision: str, run: str, reference: Path, epochs: int = EPOCHS
) -> None:
    """Train, or resume from the checkpoint in the folder, and leave one there."""
    ranks, last = 1 if kind == "one" else 2, folder / "last.ckpt"
    steering = RULES[run](reference) if run in RULES else None
    trainer = quiet_trainer(
        NormSwap("l1"),
        *([WeightNormSwap(**WEIGHT_NORMS[run])] if run in WEIGHT_NORMS else []),
        *([Int8Swap(rounding="nearest")] if run == "int8" else []),
        WeightNormTracker(every=1, steering=steering, other_run=True),
        strategy=make_strategy(kind),
        devices=ranks,
        precision=precision,
        sync_batchnorm=True,
        max_epochs=epochs,
        limit_train_batches=STEPS,
        limit_val_batches=1,  # after which FSDP2's root keeps its weights gathered
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, "", ""),
        log_every_n_steps=1,
    )
    data = Digits(batch_size=16 // ranks, image_size=8, channels=1)
    pl.seed_everything(0, verbose=False)
    task = ImageClassifier(make_net(), make_optimizer, make_scheduler)
    trainer.fit(task, data, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)


def train_all(folder: Path, reference: Path, kind: str) -> None:
    """Train each run at once; on ranks also in two parts."""
    for precision, run in RUNS:
        place = folder / kind / precision / run
        train(place / "whole", kind, precision, run, reference)
        for epochs in () if kind == "one" else (1, EPOCHS):
            train(place / "resumed", kind, precision, run, reference, epochs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording whose norms are those of the beginning, each channel's shrunk otherwise."""
    folder = tmp_path_factory.mktemp("reference")
    train(folder, "one", "32-true", "none", folder)
    recorded = NormHistory.load(folder)
    norms = {
        name: values[:1].repeat(len(recorded), 0) * np.linspace(0.95, 0.85, values.shape[1])
        for name, values in recorded.norms.items()
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
    run_python(__file__, folder, reference)
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
    if rule == "int8":
        # Ranges round differently, and values that are near the middle of two steps to another.
        assert (two - exact).norm() < 2e-3 * exact.norm()
    elif precision == "32-true":
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
    np.testing.assert_array_equal(two.learning_rates, one.learning_rates)
    assert ("net.0.0.weight_v" in one.norms) == (rule in WEIGHT_NORMS)
    for name, norms in one.norms.items():
        tolerance = 1e-5 if precision == "32-true" else 2**-6
        np.testing.assert_allclose(two.norms[name], norms, rtol=tolerance)
        np.testing.assert_array_equal(resumed.norms[name], two.norms[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rule", RULES)
def test_log_as_one_process(strategy: str, rule: str, two_ranks: Path, one_process: Path) -> None:
    places = one_process / "one", two_ranks / strategy
    one, two = (read_run(place / "32-true" / rule / "whole").scalars for place in places)
    for scalars in (one, two):  # on two ranks the first batch of validation has other images
        for tag in [tag for tag in scalars if tag.startswith("val/")]:
            del scalars[tag]
    assert list(two) == list(one)
    assert any(tag.startswith("correction_factor") for tag in one) == (rule != "none")
    for tag, series in one.items():
        assert two[tag].steps.tolist() == series.steps.tolist()
        np.testing.assert_allclose(two[tag].values, series.values, rtol=1e-3, err_msg=tag)


@TABLE
def test_resume_to_the_same_bits(strategy: str, precision: str, rule: str, two_ranks: Path) -> None:
    whole, resumed = (
        load(two_ranks, strategy, precision, rule, part) for part in ("whole", "resumed")
    )
    assert (resumed["epoch"], resumed["global_step"]) == (EPOCHS, STEPS * EPOCHS)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)


@TABLE
def test_checkpoint_is_whole(strategy: str, precision: str, rule: str, two_ranks: Path) -> None:
    """One process loads it without a Trainer, and with nothing that two ranks added."""
    file = two_ranks / strategy / precision / rule / "whole" / "last.ckpt"
    net, stored = make_net(), load(file.parent)["state_dict"]
    module = load_from_checkpoint(ImageClassifier, file, net=net, optimizer=make_optimizer)
    assert [type(net[i][1]) for i in (0, 1)] == [L1BatchNorm2d] * 2
    assert parametrize.is_parametrized(net[0][0]) == (rule in WEIGHT_NORMS)
    assert list(module.state_dict()) == list(stored)
    for name, value in module.state_dict().items():
        assert torch.equal(value.to(stored[name].dtype), stored[name])


def test_float16_under_fsdp2_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not support .*'16-mixed'.* 32-true, bf16-mixed,"):
        quiet_trainer(devices=2, strategy=make_strategy("fsdp2"), precision="16-mixed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in STRATEGIES:
        train_all(Path(sys.argv[1]), Path(sys.argv[2]), each)

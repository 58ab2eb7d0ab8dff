"""A checkpoint of another network is refused by the name of what differs."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.cli import LightningCLI

from nmlightning.errors import InputError
from nmlightning.models.resnet import CifarResNet
from nmlightning.tasks.checkpoint_match import _check_arguments
from nmlightning.tasks.classification import ImageClassifier

# Lightning 2.6 calls jsonargparse by names that have been renamed since.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


def make_cli(folder: Path, **net: object) -> LightningCLI:
    """Build, but do not run, what `nm fit` would."""
    arguments = [
        "--seed_everything=0",
        "--data=nmlightning.datamodules.digits.Digits",
        "--data.image_size=8",
        "--model=nmlightning.tasks.classification.ImageClassifier",
        "--model.net=nmlightning.models.resnet.CifarResNet",
        *(f"--model.net.{name}={value}" for name, value in {"depth": 20, **net}.items()),
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.max_epochs=1",
        f"--trainer.default_root_dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nm", *arguments])
        return LightningCLI(
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a ResNet-20 for ten classes, as `nm fit` writes it."""
    folder = tmp_path_factory.mktemp("run")
    cli = make_cli(folder)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_checkpoint_of_the_cli_rebuilds_the_network(checkpoint: Path) -> None:
    task = ImageClassifier.load_from_checkpoint(checkpoint)
    assert isinstance(task.net, CifarResNet)
    stored = torch.load(checkpoint)["state_dict"]
    assert all(torch.equal(stored[key], value) for key, value in task.state_dict().items())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"depth": 56}, r"net\.init_args\.depth: checkpoint 20, this run 56\."),
        ({"num_classes": 7}, r"net\.init_args\.num_classes: checkpoint 10, this run 7\."),
    ],
)
def test_check_same_network_names_the_differing_argument(
    checkpoint: Path, net: dict[str, int], message: str
) -> None:
    cli = make_cli(checkpoint.parent, **net)
    with pytest.raises(InputError, match=message):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)


def test_check_same_network_names_another_class(checkpoint: Path) -> None:
    cli = make_cli(checkpoint.parent)
    cli.model.hparams["net"]["class_path"] = "nmlightning.models.vgg.VGG"
    with pytest.raises(
        InputError, match=r"net\.class_path: checkpoint nmlightning\.models\.resnet"
    ):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            CifarResNet(20, num_classes=7),
            r"net\.fc\.(weight|bias): checkpoint \(10,( 64)?\), this run \(7,( 64)?\)\.",
        ),
        (
            CifarResNet(26),
            r"it lacks 3\d tensors \(net\.layer1\.3\.conv1\.weight, …\) .* no tensor",
        ),
        (
            CifarResNet(14),
            r"it lacks no tensor .* has 3\d tensors \(net\.layer1\.2\.conv1\.weight,",
        ),
    ],
)
def test_check_same_network_compares_tensors(
    checkpoint: Path, net: CifarResNet, message: str
) -> None:
    task = ImageClassifier(net, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(InputError, match=message):
        task.on_load_checkpoint(torch.load(checkpoint))


def test_check_same_network_accepts_what_torch_loads(checkpoint: Path) -> None:
    stored: dict[str, Any] = torch.load(checkpoint)
    make_task = lambda net: ImageClassifier(net, optimizer=torch.optim.SGD)  # noqa: E731
    state = stored["state_dict"]
    old = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    make_task(CifarResNet(20)).on_load_checkpoint({"state_dict": old})
    make_task(CifarResNet(20)).on_load_checkpoint({})
    lenient = make_task(CifarResNet(26))
    lenient.strict_loading = False
    lenient.on_load_checkpoint({"state_dict": state})


def test_check_arguments_accepts_two_paths_of_one_class() -> None:
    stored = {"class_path": "nmlightning.models.CifarResNet", "init_args": {"depth": 20}}
    ours = {**stored, "class_path": "nmlightning.models.resnet.CifarResNet"}
    _check_arguments(stored, ours)
    with pytest.raises(
        InputError, match=r"net\.class_path: checkpoint nmlightning\.models\.CifarR"
    ):
        _check_arguments(stored, {**stored, "class_path": "nmlightning.models.vgg.VGG"})


def test_check_arguments_refuses_two_paths_that_cannot_be_imported() -> None:
    stored, ours = ({"class_path": f"absent.{name}", "init_args": {}} for name in ("A", "B"))
    with pytest.raises(InputError, match=r"checkpoint absent\.A, this run absent\.B"):
        _check_arguments(stored, ours)

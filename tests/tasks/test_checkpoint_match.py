"""A checkpoint of another network is refused by the name of what differs."""

import pytest
import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.models.resnet import CifarResNet
from nmlightning.tasks.checkpoint_match import _check_arguments
from nmlightning.tasks.classification import ImageClassifier


def make_task(net: CifarResNet) -> ImageClassifier:
    return ImageClassifier(net, optimizer=torch.optim.SGD)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return make_task(CifarResNet(20)).state_dict()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            CifarResNet(20, num_classes=7),
            r"net\.fc\.(weight|bias): checkpoint \(10,( 64)?\), this run \(7,( 64)?\)\.",
        ),
        (CifarResNet(26), r"it lacks 3\d tensors \(net\.layer1\.3\.conv1\.weight, …\) .* no"),
        (CifarResNet(14), r"it lacks no tensor .* has 3\d tensors \(net\.layer1\.2\.conv1\.weight"),
    ],
)
def test_tensors_are_compared(state: dict[str, Tensor], net: CifarResNet, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_task(net).on_load_checkpoint({"state_dict": state})


def test_check_same_network_accepts_what_torch_loads(state: dict[str, Tensor]) -> None:
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
    with pytest.raises(InputError, match=r"checkpoint nmlightning\.models\.CifarResNet"):
        _check_arguments(stored, {**stored, "class_path": "nmlightning.models.vgg.VGG"})


def test_check_arguments_refuses_two_paths_that_cannot_be_imported() -> None:
    stored, ours = ({"class_path": f"absent.{name}", "init_args": {}} for name in ("A", "B"))
    with pytest.raises(InputError, match=r"checkpoint absent\.A, this run absent\.B"):
        _check_arguments(stored, ours)

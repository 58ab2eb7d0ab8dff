"""Test which parts of a network are sharded; test_training_on_ranks.py shards for real."""

from typing import Any

import pytest
from torch import nn

from nmlightning.errors import InputError
from nmlightning.models import VGG, CifarResNet, ResNet50
from nmlightning.parametrizations import apply_weight_norm
from nmlightning.tasks import classification
from nmlightning.tasks.classification import shard_blocks


class Mesh:
    """As Lightning's ModelParallelStrategy makes it, without any process."""

    def __init__(self, size: int, split: int = 1) -> None:
        self.of = {"tensor_parallel": split, "data_parallel": size // split}
        self.size = lambda: size

    def __getitem__(self, name: str) -> "Mesh":
        return Mesh(self.of[name])


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What `fully_shard` was called with, in order."""
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
def test_blocks_come_before_what_they_are_in(
    net: nn.Module, names: list[str], sharded: list[nn.Module]
) -> None:
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    found = {module: name for name, module in net.named_modules()}
    assert [found[module] for module in sharded] == names


def test_resnet50_has_16_blocks(sharded: list[nn.Module]) -> None:
    net = ResNet50()
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    sizes = [sum(q.numel() for q in block.parameters()) for block in sharded[:-1]]
    assert (len(sizes), max(sizes), sum(sizes)) == (16, 6_039_552, 23_498_496)  # docs/scale.md


def test_a_normalised_weight_is_no_block_of_a_resnet(sharded: list[nn.Module]) -> None:
    net: Any = CifarResNet(8)
    apply_weight_norm(net, "bounded")
    shard_blocks(net, Mesh(2))  # type: ignore[arg-type]
    assert net.layer1[0] in sharded
    assert net.conv1 not in sharded


def test_splitting_tensors_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"data_parallel_size of .* here 4, and a tensor_parallel_"
    ):
        shard_blocks(nn.Linear(2, 2), Mesh(4, split=2))  # type: ignore[arg-type]

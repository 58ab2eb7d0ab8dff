"""Test that a module whose norms are fused is otherwise what it was, and can be it again."""

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nmlightning import InputError, swap_norms
from nmlightning.models import CifarResNet
from nmlightning.surgery.fuse.fuse import fused_norms, unfuse, unfused
from nmlightning.surgery.fuse.fused_class import fusion_of

pytestmark = pytest.mark.filterwarnings("ignore:.*Norm.* is replaced by .*Norm")


class Residual(nn.Module):
    """A block that a pickle finds by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.scale = 1.0
        self.rescale = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.rescale:
            out = out * self.scale
        out += x
        result: Tensor = self.relu(out)
        return result


def make(fuse: Any = "add_relu") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), Residual())
    swap_norms(net, "l1", fuse=fuse)
    return net


def unfused_copy(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    unfuse(twin)
    return twin


def images() -> Tensor:
    return torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def copies_by_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_fused_class_changes_only_the_forward() -> None:
    plain, net = make(None), make()
    assert [type(m).__name__ for m in net.modules()] == [type(m).__name__ for m in plain.modules()]
    assert isinstance(net, nn.Sequential)
    assert isinstance(net[4], Residual)
    assert type(net[4]).__module__ == __name__
    assert list(net.state_dict()) == list(plain.state_dict())
    assert repr(net[4].norm).endswith(", fused='add_relu')")
    assert repr(net).replace(", fused='add_relu'", "").replace(", fused='relu'", "") == repr(plain)
    torch.testing.assert_close(net(images()), plain(images()))


@pytest.mark.parametrize(
    "copies", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), copies_by_file]
)
def test_copies_are_fused_and_independent(copies: Any) -> None:
    net = make()
    twin = copies(net)
    assert type(twin[4]) is type(net[4])
    assert list(fused_norms(twin).values()) == ["relu", "add_relu"]
    torch.testing.assert_close(twin(images()), net(images()), rtol=0, atol=0)
    swap_norms(twin, "l2")
    assert type(twin) is nn.Sequential
    assert type(twin[4]) is Residual
    assert fused_norms(twin) == {}
    assert len(fused_norms(net)) == 2


def test_blocks_fused_alike_share_a_class() -> None:
    """So that torch.compile compiles their code once."""
    net = CifarResNet(20)
    swap_norms(net, "l1", fuse="add_relu")
    assert len({type(block) for stage in (net.layer1, net.layer2) for block in stage}) == 1


def test_fusing_leaves_class_names_of_configs_alone() -> None:
    """Configs take a network by its class name, of which there must be one."""
    gc.disable()
    swap_norms(CifarResNet(20), "l1", fuse="add_relu")
    names = {cls.__qualname__ for cls in CifarResNet.__subclasses__()}
    gc.enable()
    assert CifarResNet.__qualname__ not in names


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_swap_without_fuse_unfuses(norm: str) -> None:
    net = make()
    report = swap_norms(net, norm)
    assert [s.after for s in report.fused] == ["", ""]
    assert "unfused 2" in str(report)
    assert (type(net), type(net[4])) == (nn.Sequential, Residual)
    assert all("fused" not in vars(m) for m in net.modules())


def test_swap_again_changes_norm_and_extent() -> None:
    net = make("relu")
    assert str(swap_norms(net, "l1", fuse="relu")).startswith("swapped 0; 1 not fused\nnot fused 4")
    assert [s.name for s in swap_norms(net, "linf", fuse="add_relu").fused] == ["4.norm"]
    assert [s.after for s in swap_norms(net, "linf", fuse="relu").fused] == [""]
    assert repr(net[1]).endswith(", fused='relu')")
    torch.testing.assert_close(net(images()), unfused_copy(net)(images()))


def test_swap_unfuses_only_included_norms() -> None:
    net = make()
    report = swap_norms(net, "linf", include=["4.norm"])
    assert [(s.name, s.before, s.after) for s in report.fused] == [("4.norm", "add_relu", "")]
    assert list(fused_norms(net)) == [net[1]]


def test_dry_run_reports_and_changes_nothing() -> None:
    net = make(None)
    swap_norms(net, "l2")
    report = swap_norms(net, "l1", fuse="add_relu", dry_run=True)
    assert str(report) == (
        "would swap 2 BatchNorm2d → L1BatchNorm2d; would fuse 1 with the ReLU after them, "
        "1 with the addition and the ReLU after them"
    )
    assert fused_norms(net) == {}
    assert type(net[4]) is Residual


CHANGES = {
    "another activation": lambda net: setattr(net[4], "relu", nn.GELU()),
    "no activation": lambda net: delattr(net[4], "relu"),
    "another branch": lambda net: setattr(net[4], "rescale", True),
    "another norm": lambda net: net[4].register_module("norm", nn.SyncBatchNorm(4)),
    "in a Sequential": lambda net: net.__setitem__(3, nn.GELU()),
    "another norm in a Sequential": lambda net: net.__setitem__(1, nn.SyncBatchNorm(4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_watched_changes_unfuse(change: str) -> None:
    net = make()
    with pytest.warns(UserWarning, match="was changed, on which its fused norms depend"):
        CHANGES[change](net)
    changed = net if change.endswith("Sequential") else net[4]
    assert fusion_of(changed) is None
    assert len(fused_norms(net)) == 1


def test_other_changes_keep_norms_fused() -> None:
    net = make()
    net[4].conv = nn.Conv2d(4, 4, 1)
    net[4].rescale = False
    net[4].note = "mine"
    net.train().half().float()
    assert len(fused_norms(net)) == 2


def test_script_is_refused() -> None:
    with pytest.warns(FutureWarning), pytest.raises(InputError, match="swap_norms without fuse"):
        torch.jit.script(make().eval())


def test_slices_of_a_fused_sequential_compute_the_same() -> None:
    net = make()
    twin = unfused_copy(net)
    for part in (slice(0, 4), slice(3, 5), slice(0, 5), slice(4, 5)):
        torch.testing.assert_close(net[part](images()), twin[part](images()))
    rebuilt = nn.Sequential(*net.children())
    torch.testing.assert_close(rebuilt(images()), twin(images()))
    with pytest.raises(InputError, match="norm 1 of a Sequential is fused with a ReLU that no"):
        net[:2](images())


def test_fused_sequential_may_grow() -> None:
    net = make()
    net.append(nn.Flatten())
    net.insert(0, nn.Identity())
    torch.testing.assert_close(net(images()), unfused_copy(net)(images()))
    swap_norms(net, "l1")
    assert fused_norms(net) == {}


def test_unfused_restores_the_fused_classes() -> None:
    net = make()
    classes = [type(m) for m in net.modules()]
    with unfused(net):
        assert fused_norms(net) == {}
    assert [type(m) for m in net.modules()] == classes
    assert list(fused_norms(net).values()) == ["relu", "add_relu"]


def test_weight_norm_and_optimizer_keep_working() -> None:
    net, twin = make(), make(None)
    for model in (net, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parametrizations.weight_norm(model[4].conv)
        model(images()).square().sum().backward()
        optimizer.step()
    assert len(fused_norms(net)) == 2
    torch.testing.assert_close([*net.parameters()], [*twin.parameters()])


def test_unfusing_a_changed_class_is_refused() -> None:
    net = make()
    net[4].__class__ = type("FSDPResidual", (type(net[4]),), {})
    before = [type(m) for m in net.modules()]
    with pytest.raises(InputError, match="Residual with fused norms has become FSDPResidual"):
        swap_norms(net, "l2")
    assert [type(m) for m in net.modules()] == before
    swap_norms(net, "linf", fuse="add_relu")


def test_in_place_change_of_the_output_raises() -> None:
    """As after a ReLU, whose backward needs its output, too."""
    net = make()
    y = net(images())
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Dynamo of torch 2.11 instantiates any autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_fused_network_compiles_in_one_graph(norm: str) -> None:
    net = make()
    swap_norms(net, norm, fuse="add_relu")
    twin = unfused_copy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, same = images().requires_grad_(), images().requires_grad_()
    for model, given in ((compiled, x), (twin, same)):
        model(given).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ({"fuse": "relus"}, "fuse is 'relu' or 'add_relu', got 'relus'. Did you mean 'relu'?"),
        ({"fuse": "relu", "norm": "l2"}, "'l2' is torch's own, give fuse=None"),
        ({"fuse": "relu", "kinds": ["layer"]}, "fuse is for batch norms, and kinds is"),
    ],
)
def test_swap_norms_refuses_bad_fuse(arguments: dict[str, Any], answer: str) -> None:
    with pytest.raises(InputError) as error:
        swap_norms(nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3)), **arguments)
    assert answer in str(error.value)

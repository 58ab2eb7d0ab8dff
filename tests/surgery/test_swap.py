"""Test that a swap changes the norms it was asked to change, keeps everything else, and undoes."""

import copy
import io
import math
import pickle
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import prune

from nmlightning import norms, swap_norms
from nmlightning.errors import InputError
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.registry import path_of

# The norm of each is a batch norm, as plain nn layers, timm's BatchNormAct2d, or both.
ARCHITECTURES = [
    ("torchvision", "resnet18", "l1"),
    ("torchvision", "densenet121", "l1"),
    ("torchvision", "mobilenet_v2", "mean"),
    ("torchvision", "mobilenet_v3_small", "linf"),
    ("torchvision", "regnet_y_400mf", "l1"),
    ("torchvision", "googlenet", "top10"),
    ("torchvision", "shufflenet_v2_x0_5", "l1"),
    ("torchvision", "mnasnet0_5", "linf"),
    ("timm", "efficientnet_b0", "l1"),
    ("timm", "convnext_atto", "l1"),
    ("timm", "mobilenetv4_conv_small_035", "top10"),
    ("timm", "regnetx_002", "l1"),
    ("timm", "ghostnet_050", "linf"),
    ("timm", "cspresnet50", "l1"),
    ("timm", "tinynet_e", "top10"),
]
MORE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "convnext_atto": {"norm_layer": "batchnorm"},
    "googlenet": {"init_weights": False, "aux_logits": False},
}


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def refusal(model: nn.Module, *arguments: Any, **keywords: Any) -> str:
    """Return what `swap_norms` says no with, after checking that it changed nothing."""
    before = classes(model)
    with pytest.raises(InputError) as error:
        swap_norms(model, *arguments, **keywords)
    assert classes(model) == before
    message = str(error.value)
    assert "\n" not in message
    return message


class TestReport:
    def test_counts_and_prints(self, net: nn.Sequential) -> None:
        net = nn.Sequential(*net, nn.GroupNorm(2, 4))
        report = swap_norms(net, "top10")
        assert len(report) == 2
        assert str(report).splitlines() == [
            "swapped 2 BatchNorm2d → TopKBatchNorm2d; 1 not swapped",
            "not swapped 4: no swap is defined for this norm",
        ]
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(report)
        table = console.export_text()
        assert all(word in table for word in ("module", "from", "to", "3.1", "TopKBatchNorm2d"))
        assert "not swapped: no swap is defined" in table

    def test_escapes_names(self) -> None:
        """Rich would take what stands in brackets for a style."""
        norm = type("Group[bold]Norm", (nn.GroupNorm,), {})
        net = nn.ModuleDict({"[red]x": nn.BatchNorm2d(4), "[/]y": norm(2, 4)})
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(swap_norms(net))
        table = console.export_text()
        assert all(name in table for name in ("[red]x", "[/]y", "Group[bold]Norm"))

    def test_dry_run_changes_nothing(self, net: nn.Sequential) -> None:
        before = classes(net)
        report = swap_norms(net, "l1", dry_run=True)
        assert str(report) == "would swap 2 BatchNorm2d → L1BatchNorm2d"
        assert [swap.name for swap in report.swapped] == ["1", "3.1"]
        assert classes(net) == before

    def test_second_swap_does_nothing(self, net: nn.Sequential) -> None:
        swap_norms(net, "top10", {"constant": "paper"})
        report = swap_norms(net, "top10", {"constant": "paper"})
        assert (len(report), str(report)) == (0, "swapped 0")
        assert len(swap_norms(net, "top10", {"constant": "exact"})) == 2


class TestWhatIsKept:
    def test_parameters_and_buffers_are_the_same_objects(self, net: nn.Sequential) -> None:
        before = {name: id(q) for name, q in (*net.named_parameters(), *net.named_buffers())}
        state = list(net.state_dict())
        swap_norms(net, "l1")
        after = {name: id(q) for name, q in (*net.named_parameters(), *net.named_buffers())}
        assert after == before
        assert list(net.state_dict()) == state

    def test_eps_and_momentum_are_those_of_the_layer_unless_given(self, net: nn.Sequential) -> None:
        swap_norms(net, "l1", {"momentum": 0.5})
        assert repr(net[1]).startswith("L1BatchNorm2d(8, eps=0.001, momentum=0.5, ")

    def test_hooks_still_run(self, net: nn.Sequential, images: Tensor) -> None:
        seen: list[str] = []
        net[1].register_forward_hook(lambda *_: seen.append("forward"))
        net[1].register_forward_pre_hook(lambda *_: seen.append("before"))
        swap_norms(net, "l1")
        net(images)
        assert seen == ["before", "forward"]

    def test_training_mode_and_frozen_parameters_stay(self, net: nn.Sequential) -> None:
        net[1].eval().weight.requires_grad_(False)
        swap_norms(net, "l1")
        assert not net[1].training
        assert not net[1].weight.requires_grad
        assert net[3][1].training


class TestWhichLayers:
    def test_batch_norms_of_any_dimension(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4))
        net.append(nn.BatchNorm2d(4, affine=False, track_running_stats=False))
        original = classes(net)
        swap_norms(net, "l1")
        ours = [norms.L1BatchNorm1d, norms.L1BatchNorm2d, norms.L1BatchNorm3d, norms.L1BatchNorm2d]
        assert classes(net)[1:] == ours
        swap_norms(net, "l2")
        assert classes(net) == original

    def test_root_that_is_a_norm(self) -> None:
        norm = nn.BatchNorm2d(3)
        assert len(swap_norms(norm, "l1")) == 1
        assert type(norm) is norms.L1BatchNorm2d

    def test_shared_module_stays_shared_and_has_all_names(self) -> None:
        norm = nn.BatchNorm2d(3)
        net = nn.Sequential(norm, nn.ReLU(), norm)
        report = swap_norms(net, "l1")
        assert [swap.name for swap in report.swapped] == ["0", "2"]
        assert net[0] is net[2] is norm

    def test_shared_module_is_left_if_excluded_once(self) -> None:
        norm = nn.BatchNorm2d(3)
        net = nn.Sequential(norm, nn.ReLU(), norm, nn.BatchNorm2d(3))
        report = swap_norms(net, "l1", exclude=["2"])
        assert [swap.name for swap in report.swapped] == ["3"]
        assert type(norm) is nn.BatchNorm2d

    def test_include_and_exclude(self) -> None:
        net = torchvision.models.resnet18(num_classes=3)
        report = swap_norms(net, "l1", include=["layer1.*", "layer2.*"], exclude=["*.bn2"])
        assert {swap.name for swap in report.swapped} == {
            *(f"layer{i}.{j}.bn1" for i in (1, 2) for j in (0, 1)),
            "layer2.0.downsample.1",
        }
        assert type(net.bn1) is nn.BatchNorm2d

    def test_lazy_norm_is_swappable_after_its_first_batch(self, images: Tensor) -> None:
        net = nn.Sequential(nn.LazyBatchNorm2d())
        assert "not initialised, run one batch" in refusal(net, include=["0"])
        net(images)
        assert len(swap_norms(net)) == 1


def some(*makes: Any) -> Any:
    return lambda: nn.Sequential(*(make(4) for make in makes))


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (torchvision.models.resnet18, {"include": ["x"]}, "layer1.0.bn2 (BatchNorm2d) and 17 more."),
    (
        some(*[nn.LayerNorm] * 5, nn.RMSNorm),
        {},
        "There is no batch norm to swap in Sequential. Its norm layers are 0 (LayerNorm), "
        '1 (LayerNorm), 2 (LayerNorm) and 3 more. Swap them with kinds=["layer", "rms"].',
    ),
    (
        some(nn.BatchNorm2d, nn.LayerNorm),
        {"include": ["0", "1"]},
        "The pattern '1' in include matches no batch norm",
    ),
    (some(nn.BatchNorm2d), {"exclude": ["*"]}, "leave no batch norm"),
    (
        some(),
        {},
        "There is no batch norm to swap in Sequential. It has no norm layers; is the net built in "
        "configure_model?",
    ),
    (lambda: nn.Sequential(nn.BatchNorm2d(0)), {}, "0 has no channels: exclude it."),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
class TestInput:
    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            ({"norm": "l_1"}, "There is no norm 'l_1'; .* Did you mean 'l1'\\?"),
            ({"options": {"epsilon": 1}}, "no option 'epsilon' .* Did you mean 'eps'\\?"),
            ({"options": {"eps": -1.0}}, "eps must be .* got -1.0"),
            ({"kinds": ["bach"]}, "got 'bach'. Did you mean 'batch'\\?"),
            ({"kinds": []}, "kinds is empty"),
            ({"kinds": ["layer"], "norm": "linf"}, "'linf' is not defined for layer norms"),
            ({"norm": None}, "There is no norm None; there are l2, l1"),
            ({"kinds": None}, "kinds is a list of strings, got None"),
            ({"kinds": [1]}, "kinds is a list of strings, got \\[1\\]"),
            ({"include": [1]}, "include is a list of strings, got \\[1\\]"),
            ({"options": {"sync": "no"}}, "sync is True or False, got 'no'"),
            ({"dry_run": "no"}, "dry_run is True or False, got 'no'"),
            ({"include": "layer1.*"}, "include is a list, got the string 'layer1\\.\\*'"),
        ],
    )
    def test_bad_arguments_are_named(
        self, net: nn.Sequential, arguments: dict[str, Any], answer: str
    ) -> None:
        assert re.search(answer, refusal(net, **arguments))

    def test_unmatched_pattern_lists_the_norms(self, net: nn.Sequential) -> None:
        for argument in ("include", "exclude"):
            message = refusal(net, **{argument: ["layer1.*"]})
            assert (
                f"The pattern 'layer1.*' in {argument} matches no batch norm of Sequential"
                in message
            )
            assert "Its norm layers are 1 (BatchNorm2d), 3.1 (BatchNorm2d)." in message

    @pytest.mark.parametrize(("make", "arguments", "answer"), REFUSALS)
    def test_refusals_say_what_there_is(
        self, make: Any, arguments: dict[str, Any], answer: str
    ) -> None:
        assert answer in refusal(make(), **arguments)

    def test_sharded_layer_is_refused_unless_swapped_before(self, net: nn.Sequential) -> None:
        class DTensor(nn.Parameter):
            pass

        net[1].weight = DTensor(torch.ones(8))
        assert "1 is sharded already: call swap_norms in configure_model" in refusal(net)
        plain = net[1].weight
        net[1].weight = nn.Parameter(torch.ones(8))
        swap_norms(net)
        net[1].weight = plain
        assert len(swap_norms(net)) == 0


class TestUndo:
    @pytest.mark.parametrize(
        "norms", [["l1"], ["linf"], ["l1", "linf", "top10"], ["lp", "topk"], ["mean"]]
    )
    def test_l2_reverts(self, net: nn.Sequential, images: Tensor, norms: list[str]) -> None:
        original = copy.deepcopy(net)
        for norm in norms:
            swap_norms(net, norm)
            assert len(net[1].__dict__.keys() - original[1].__dict__.keys()) >= (
                2 if norm == "mean" else 3
            )
        swap_norms(net, "l2")
        assert classes(net) == classes(original)
        assert net[1].__dict__.keys() == original[1].__dict__.keys()
        torch.testing.assert_close(net(images), original(images), rtol=0, atol=0)

    def test_settings_of_the_last_norm_are_removed(self, net: nn.Sequential) -> None:
        swap_norms(net, "topk", {"k": 3, "constant": "paper"})
        swap_norms(net, "l1")
        assert not hasattr(net[1], "k")
        assert net[1].constant == "exact"
        assert repr(net[1]).startswith("L1BatchNorm2d(8, eps=0.001, momentum=0.2, ")


class TestSynchronised:
    def test_sync_batch_norm_swaps_to_synchronised_and_reverts(self) -> None:
        group = object()
        net = nn.Sequential(nn.SyncBatchNorm(3))
        net[0].process_group = group
        assert str(swap_norms(net, "l1")) == "swapped 1 SyncBatchNorm → L1SyncBatchNorm"
        assert isinstance(net[0], norms.L1BatchNorm)
        assert isinstance(net[0], nn.SyncBatchNorm)
        x = 2 * torch.randn(4, 3, 5) + 1
        torch.testing.assert_close(net(x), norms.L1BatchNorm(3)(x))
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net[:1]))):
            assert type(twin[0]) is type(net[0])
            torch.testing.assert_close(twin(x), net(x))
        assert net[0].sync
        assert net[0].process_group is group
        assert len(swap_norms(net, "l1")) == 0
        for norm in ("top10", "mean"):
            swap_norms(net, norm)
            assert net[0].sync
        swap_norms(net, "l2")
        assert type(net[0]) is nn.SyncBatchNorm
        assert net[0].process_group is group

    def test_synchronised_norm_reverts_to_sync_batch_norm(self, images: Tensor) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3))
        swap_norms(net, "l1", {"sync": True})
        swap_norms(net, "l2")
        assert type(net[0]) is nn.SyncBatchNorm
        assert net[0].eval()(images).shape == (4, 3, 8, 8)


class MyRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


class MyNorm(nn.RMSNorm):
    pass


class Mine(nn.BatchNorm2d):
    pass


def replaced() -> nn.Module:
    """Its class is no longer what runs, so a swap would change nothing but the report."""
    norm: Any = nn.BatchNorm2d(4)
    norm.forward = norm.forward
    return norm


UNKNOWN = f"an unknown class: name it by types={{'{__name__}.%s': 'rms'}}"
NO_SWAP = "no swap is defined for this norm"
LEFT: list[tuple[Any, str, str]] = [
    (lambda: Mine(4), f"a subclass: name it by types={{'{path_of(Mine)}': 'batch'}}", "batch"),
    (lambda: nn.GroupNorm(2, 4), NO_SWAP, "batch"),
    (lambda: nn.InstanceNorm2d(4), NO_SWAP, "batch"),
    (lambda: timm.layers.GroupNormAct(4, 2), NO_SWAP, "batch"),
    (lambda: torchvision.ops.FrozenBatchNorm2d(4), NO_SWAP, "batch"),
    (replaced, "its forward was replaced on the object, where no class counts", "batch"),
    (MyRMSNorm, UNKNOWN % "MyRMSNorm", "rms"),
    (lambda: MyNorm(8), UNKNOWN % "MyNorm", "rms"),
    (lambda: timm.layers.GroupNorm(8, 2), NO_SWAP, "rms"),
    (lambda: timm.layers.SimpleNorm(8), NO_SWAP, "rms"),
]


class TestOtherKinds:
    def net(self) -> nn.Sequential:
        others = (nn.LayerNorm(8, bias=False), nn.BatchNorm1d(8))
        return nn.Sequential(nn.RMSNorm(8, eps=1e-3), nn.RMSNorm(8), *others)

    def test_swaps_by_kinds_and_reverts(self) -> None:
        net, x = self.net(), torch.randn(4, 8)
        expected = net(x)
        weight = net[0].weight
        assert str(swap_norms(net, "l1", kinds=["rms"])) == "swapped 2 RMSNorm → L1RMSNorm"
        assert classes(net)[1:] == [norms.L1RMSNorm] * 2 + [nn.LayerNorm, nn.BatchNorm1d]
        assert (net[0].eps, net[1].eps) == (1e-3, None)
        assert net[0].weight is weight
        torch.testing.assert_close(net[0](x), norms.L1RMSNorm(8, eps=1e-3)(x))
        assert len(swap_norms(net, "l1", kinds=["rms"])) == 0
        swap_norms(net, "lp", {"p": 3}, kinds=["rms", "layer"])
        assert classes(net)[1:] == [norms.LpRMSNorm] * 2 + [norms.LpLayerNorm, nn.BatchNorm1d]
        assert net[2].p == 3
        swap_norms(net, "l2", kinds=["layer", "rms"])
        assert classes(net) == classes(self.net())
        assert vars(net[0]).keys() == vars(nn.RMSNorm(8)).keys()
        assert torch.equal(net(x), expected)

    @pytest.mark.parametrize(("make", "reason", "kind"), LEFT)
    def test_what_is_left_is_named_or_refused_if_included(
        self, make: Any, reason: str, kind: str
    ) -> None:
        net = nn.Sequential(nn.RMSNorm(8) if kind == "rms" else nn.BatchNorm2d(4), norm := make())
        report, before = swap_norms(net, kinds=kind), type(norm)
        assert [(x.name, x.before, x.reason) for x in report.left] == [
            ("1", before.__name__, reason)
        ]
        assert type(norm) is before
        assert f"1 ({before.__name__}: {reason}" in refusal(net, kinds=kind, include=["0", "1"])
        none = "There is no RMS norm to swap" if kind == "rms" else "There is no batch norm to swap"
        assert none in refusal(nn.Sequential(norm), kinds=kind)


def build(library: str, name: str) -> nn.Module:
    more = MORE_ARGUMENTS.get(name, {})
    if library == "timm":
        return timm.create_model(name, num_classes=3, **more)
    return torchvision.models.get_model(name, weights=None, num_classes=3, **more)


@pytest.mark.parametrize(("library", "name", "norm"), ARCHITECTURES)
def test_architectures_swap_and_train_a_step(library: str, name: str, norm: str) -> None:
    net = build(library, name)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    report = swap_norms(net, norm)
    assert len(norms) > 10
    assert len(report) == len(norms)
    assert not report.left
    assert all(isinstance(m, BatchNormBase) for m in norms)
    before = [m.bias.detach().clone() for m in norms]
    # Twelve images: the last norms see one pixel of each, and top10 needs ten values.
    loss = net(torch.randn(12, 3, 32, 32)).square().mean()
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    assert all(q.isfinite().all() for q in net.state_dict().values())
    # Not all of them: behind a residual branch that starts at zero there is no gradient yet.
    assert any(not torch.equal(m.bias, b) for m, b in zip(norms, before, strict=True))


@pytest.mark.parametrize("fuse", [None, "relu"])
def test_swap_that_fails_leaves_the_model_as_it_was(net: nn.Sequential, fuse: str | None) -> None:
    nn.init.normal_(net[1].weight)
    if fuse:
        swap_norms(net, "l1", fuse=fuse)
    with torch.inference_mode():
        net[3][1].weight = nn.Parameter(torch.randn(4), requires_grad=False)
    before = copy.deepcopy(net.state_dict())
    classes = [type(m) for m in net.modules()]
    learns = [q.requires_grad for q in net.parameters()]
    attributes = [dict(vars(m)) for m in net.modules()]
    with pytest.raises(InputError, match=r"^3.1 cannot become Mean.* inference tensor .* Clone"):
        swap_norms(net, "mean")
    assert [type(m) for m in net.modules()] == classes
    assert [q.requires_grad for q in net.parameters()] == learns
    assert [vars(m).keys() for m in net.modules()] == [a.keys() for a in attributes]
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_pruned_norm_becomes_mean_and_comes_back(net: nn.Sequential, images: Tensor) -> None:
    prune.random_unstructured(net[3][1], "weight", amount=2)
    swap_norms(net, "mean")
    assert not net[3][1].weight_orig.requires_grad
    means = net(images).mean((0, 2, 3)) - net[3][1].bias
    torch.testing.assert_close(means, torch.zeros(4), rtol=0, atol=1e-6)
    swap_norms(net, "l2")
    assert net[3][1].weight_orig.requires_grad
    assert torch.count_nonzero(net(images).std((0, 2, 3)) > 1e-3) == 2

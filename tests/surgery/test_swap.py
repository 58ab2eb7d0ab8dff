"""Test that a swap changes the norms it was asked to change, keeps everything else, and undoes."""

import copy
import io
import math
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

from nmlightning import swap_norms
from nmlightning.errors import InputError
from nmlightning.norms import batch_norm as ours
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.layer_norm import L1LayerNorm, L1RMSNorm, LpLayerNorm, LpRMSNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm, MeanOnlyBatchNorm2d

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


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.2),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)),
    )


def images(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(4, channels, size, size)


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
    def test_it_counts_and_prints(self) -> None:
        net = nn.Sequential(*small_net(), nn.GroupNorm(2, 4))
        report = swap_norms(net, "top10")
        assert len(report) == 2
        assert str(report) == ("swapped 2 BatchNorm2d → TopKBatchNorm2d; 1 left as they are")
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(report)
        table = console.export_text()
        assert all(word in table for word in ("module", "from", "to", "3.1", "TopKBatchNorm2d"))
        assert "left: no swap is defined for this norm" in table

    def test_names_are_printed_as_they_are(self) -> None:
        """Rich would take what stands in brackets for a style."""
        norm = type("Group[bold]Norm", (nn.GroupNorm,), {})
        net = nn.ModuleDict({"[red]x": nn.BatchNorm2d(4), "[/]y": norm(2, 4)})
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(swap_norms(net))
        table = console.export_text()
        assert all(name in table for name in ("[red]x", "[/]y", "Group[bold]Norm"))

    def test_a_dry_run_changes_nothing(self) -> None:
        net = small_net()
        before = classes(net)
        report = swap_norms(net, "l1", dry_run=True)
        assert str(report) == "would swap 2 BatchNorm2d → L1BatchNorm2d"
        assert [swap.name for swap in report.swapped] == ["1", "3.1"]
        assert classes(net) == before

    def test_the_second_swap_does_nothing(self) -> None:
        net = small_net()
        swap_norms(net, "top10", {"constant": "paper"})
        report = swap_norms(net, "top10", {"constant": "paper"})
        assert (len(report), str(report)) == (0, "swapped 0")
        assert len(swap_norms(net, "top10", {"constant": "exact"})) == 2


class TestWhatIsKept:
    def test_parameters_and_buffers_are_the_same_objects(self) -> None:
        net = small_net()
        before = {name: id(q) for name, q in (*net.named_parameters(), *net.named_buffers())}
        state = list(net.state_dict())
        swap_norms(net, "l1")
        after = {name: id(q) for name, q in (*net.named_parameters(), *net.named_buffers())}
        assert after == before
        assert list(net.state_dict()) == state

    def test_eps_and_momentum_are_those_of_the_layer_unless_given(self) -> None:
        net = small_net()
        swap_norms(net, "l1", {"momentum": 0.5})
        assert repr(net[1]) == "L1BatchNorm2d(8, eps=0.001, momentum=0.5)"

    def test_an_optimizer_made_before_trains_the_swapped_layers(self) -> None:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        swap_norms(net, "l1")
        before = net[1].weight.detach().clone()
        net(images()).square().sum().backward()
        optimizer.step()
        assert not torch.equal(net[1].weight, before)

    def test_hooks_still_run(self) -> None:
        net, seen = small_net(), []
        net[1].register_forward_hook(lambda *_: seen.append("forward"))
        net[1].register_forward_pre_hook(lambda *_: seen.append("before"))
        swap_norms(net, "l1")
        net(images())
        assert seen == ["before", "forward"]

    def test_evaluation_of_a_swapped_layer_is_torchs(self) -> None:
        net, x = small_net().eval(), images()
        expected = net(x)
        swap_norms(net, "linf")
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)

    def test_training_mode_and_frozen_parameters_stay(self) -> None:
        net = small_net()
        net[1].eval().weight.requires_grad_(False)
        swap_norms(net, "l1")
        assert not net[1].training
        assert not net[1].weight.requires_grad
        assert net[3][1].training


class TestWhichLayers:
    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (nn.BatchNorm1d(4), ours.L1BatchNorm1d),
            (nn.BatchNorm2d(4), ours.L1BatchNorm2d),
            (nn.BatchNorm3d(4), ours.L1BatchNorm3d),
            (nn.BatchNorm2d(4, affine=False, track_running_stats=False), ours.L1BatchNorm2d),
        ],
    )
    def test_batch_norms_of_any_dimension(self, layer: nn.Module, expected: type) -> None:
        original = type(layer)
        net = nn.Sequential(layer)
        swap_norms(net, "l1")
        assert type(net[0]) is expected
        swap_norms(net, "l2")
        assert type(net[0]) is original

    def test_a_root_that_is_itself_a_norm(self) -> None:
        norm = nn.BatchNorm2d(3)
        assert len(swap_norms(norm, "l1")) == 1
        assert type(norm) is ours.L1BatchNorm2d

    def test_a_shared_module_stays_shared_and_is_named_at_every_place(self) -> None:
        norm = nn.BatchNorm2d(3)
        net = nn.Sequential(norm, nn.ReLU(), norm)
        report = swap_norms(net, "l1")
        assert [swap.name for swap in report.swapped] == ["0", "2"]
        assert net[0] is net[2] is norm

    def test_a_shared_module_is_left_alone_if_exclude_names_it_once(self) -> None:
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

    def test_a_subclass_is_left_or_refused_if_named(self) -> None:
        class Mine(nn.BatchNorm2d):
            pass

        net = nn.Sequential(nn.BatchNorm2d(3), Mine(3))
        report = swap_norms(net, "l1")
        assert [(left.name, left.before, left.reason) for left in report.left] == [
            ("1", "Mine", "a subclass, and only exact types are swapped")
        ]
        assert type(net[1]) is Mine
        assert "1 (Mine: a subclass" in refusal(net, "linf", include=["*"])

    @pytest.mark.parametrize(
        "layer",
        [
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4),
            timm.layers.GroupNormAct(4, 2),
            timm.layers.RmsNorm(4),
            torchvision.ops.FrozenBatchNorm2d(4),
            nn.LazyBatchNorm2d(),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    def test_other_norms_are_refused_by_name(self, layer: nn.Module) -> None:
        net = nn.Sequential(nn.BatchNorm2d(4), layer)
        assert f"1 ({type(layer).__name__}: " in refusal(net, include=["0", "1"])
        assert [left.name for left in swap_norms(net).left] == ["1"]

    def test_a_norm_whose_forward_was_replaced_is_left_or_refused_if_named(self) -> None:
        """Its class is no longer what runs, so a swap would change nothing but the report."""
        net = small_net()
        net[1].forward = net[1].forward
        report = swap_norms(net)
        assert [swap.name for swap in report.swapped] == ["3.1"]
        assert [(left.name, left.reason) for left in report.left] == [
            ("1", "its forward was replaced on the object, where no class counts")
        ]
        assert "1 (BatchNorm2d: its forward was replaced" in refusal(net, include=["1"])

    def test_a_lazy_norm_becomes_swappable_with_its_first_batch(self) -> None:
        net = nn.Sequential(nn.LazyBatchNorm2d())
        assert "not initialised, run one batch" in refusal(net, include=["0"])
        net(images())
        assert len(swap_norms(net)) == 1


class TestInput:
    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            ({"norm": "l_1"}, "There is no norm 'l_1'; .* Did you mean 'l1'\\?"),
            ({"options": {"epsilon": 1}}, "no option 'epsilon' .* Did you mean 'eps'\\?"),
            ({"options": {"eps": -1.0}}, "eps must be .* got -1.0"),
            ({"options": {"k": 3}}, "'l1' has no option 'k'"),
            ({"norm": "top10", "options": {"k": 3}}, "'top10' has k = 10 by its name"),
            ({"norm": "topk", "options": {"k": 0}}, "k must be .* got 0"),
            ({"norm": "lp", "options": {"p": 0.5}}, "p must be .* got 0.5"),
            ({"options": {"constant": "exakt"}}, "'exakt'.* Did you mean 'exact'\\?"),
            ({"kinds": ["bach"]}, "got 'bach'. Did you mean 'batch'\\?"),
            ({"kinds": []}, "kinds is empty"),
            ({"kinds": "batch"}, "kinds is a list, got the string 'batch'"),
            ({"kinds": ["layer"], "norm": "linf"}, "'linf' is not defined for layer norms"),
            ({"kinds": ["rms"], "norm": "linf"}, "'linf' is not defined for RMS norms"),
            ({"norm": None}, "There is no norm None; there are l2, l1"),
            ({"kinds": None}, "kinds is a list of strings, got None"),
            ({"kinds": [1]}, "kinds is a list of strings, got \\[1\\]"),
            ({"include": [1]}, "include is a list of strings, got \\[1\\]"),
            ({"exclude": 1}, "exclude is a list of strings, got 1"),
            ({"options": {"sync": "no"}}, "sync is True or False, got 'no'"),
            ({"dry_run": "no"}, "dry_run is True or False, got 'no'"),
            ({"include": "layer1.*"}, "include is a list, got the string 'layer1\\.\\*'"),
            ({"exclude": "layer1.*"}, "exclude is a list, got the string 'layer1\\.\\*'"),
        ],
    )
    def test_what_cannot_be_is_named(self, arguments: dict[str, Any], answer: str) -> None:
        assert re.search(answer, refusal(small_net(), **arguments))

    def test_a_pattern_that_matches_nothing_lists_the_norms(self) -> None:
        for argument in ("include", "exclude"):
            message = refusal(small_net(), **{argument: ["layer1.*"]})
            assert (
                f"The pattern 'layer1.*' in {argument} matches no batch norm of Sequential"
                in message
            )
            assert "Its norm layers are 1 (BatchNorm2d), 3.1 (BatchNorm2d)." in message

    def test_a_long_list_of_norms_is_cut(self) -> None:
        message = refusal(torchvision.models.resnet18(), include=["x"])
        assert message.endswith("and 8 more.")

    def test_a_pattern_that_matches_only_the_other_kind(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3))
        message = refusal(net, include=["0", "1"])
        assert "The pattern '1' in include matches no batch norm" in message

    def test_exclude_that_leaves_nothing(self) -> None:
        assert "leave no batch norm" in refusal(small_net(), exclude=["*"])

    def test_a_model_without_norms(self) -> None:
        message = refusal(nn.Sequential(nn.Linear(2, 2)))
        assert message == (
            "There is no batch norm to swap in Sequential. It has no norm layers; "
            "is the net built in configure_model?"
        )

    def test_a_sharded_layer_is_refused_but_one_swapped_before_is_fine(self) -> None:
        class DTensor(nn.Parameter):
            pass

        net = small_net()
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
    def test_l2_undoes(self, norms: list[str]) -> None:
        net, x = small_net(), images()
        original = copy.deepcopy(net)
        for norm in norms:
            swap_norms(net, norm)
            assert len(net[1].__dict__.keys() - original[1].__dict__.keys()) >= (
                2 if norm == "mean" else 3
            )
        swap_norms(net, "l2")
        assert classes(net) == classes(original)
        assert net[1].__dict__.keys() == original[1].__dict__.keys()
        torch.testing.assert_close(net(x), original(x), rtol=0, atol=0)

    def test_settings_of_the_last_norm_do_not_linger(self) -> None:
        net = small_net()
        swap_norms(net, "topk", {"k": 3, "constant": "paper"})
        swap_norms(net, "l1")
        assert not hasattr(net[1], "k")
        assert net[1].constant == "exact"
        assert repr(net[1]) == "L1BatchNorm2d(8, eps=0.001, momentum=0.2)"


class TestMeanOnly:
    """The one norm without a scale: its layers have the weight, which is 1 and learns nothing."""

    def net(self) -> nn.Sequential:
        """Return a net in which no scale is 1, and one is 0 at first, as in residual branches."""
        net = small_net()
        nn.init.normal_(net[1].weight, mean=3.0)
        nn.init.zeros_(net[3][1].weight)
        net(5 * images())
        return net

    def test_the_scale_goes_and_the_mean_and_the_bias_stay(self) -> None:
        net = self.net()
        norm, x = net[1], torch.randn(4, 8, 2, 2)
        shift = (norm.bias - norm.running_mean).view(-1, 1, 1)
        swap_norms(net, "mean")
        torch.testing.assert_close(norm.eval()(x), x + shift)
        assert net(images()).std() > 0.1

    def test_an_optimizer_made_before_trains_the_biases_and_leaves_the_weights(self) -> None:
        net = self.net()
        norms = (net[1], net[3][1])
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        net(images()).square().sum().backward()
        ids = [id(q) for q in net.parameters()]
        swap_norms(net, "mean")
        before = [norm.bias.detach().clone() for norm in norms]
        for _ in range(2):  # The gradients of the first step are from before the swap.
            optimizer.step()
            net(images()).square().sum().backward()
        assert [id(q) for q in net.parameters()] == ids
        for norm, bias in zip(norms, before, strict=True):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not torch.equal(norm.bias, bias)

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_the_next_norm_evaluates_alike_and_its_weight_learns(self, norm: str) -> None:
        net, x = self.net(), images()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        swap_norms(net, "mean")
        net(x)
        expected = net.eval()(x)
        swap_norms(net, norm)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
        net.train()(x).pow(3).sum().backward()
        optimizer.step()
        assert not torch.equal(net[1].weight, torch.ones(8))

    def test_a_frozen_weight_is_frozen_afterwards(self) -> None:
        net = self.net()
        net[1].weight.requires_grad_(False)
        for norm, options in (("mean", {}), ("mean", {"eps": 0.1}), ("l2", {})):
            swap_norms(net, norm, options)
            weights = (net[1].weight.requires_grad, net[3][1].weight.requires_grad)
            assert weights == (False, norm == "l2")
            variance = {"mean": 1 - net[1].eps, "l2": 0.9}[norm]
            torch.testing.assert_close(net[1].running_var, torch.full((8,), variance))

    def test_a_weight_that_was_frozen_once_may_learn_after_the_next_swap(self) -> None:
        net = self.net()
        for frozen in (True, False):
            net[1].weight.requires_grad_(not frozen)
            swap_norms(net, "mean")
            swap_norms(net, "l2")
            assert net[1].weight.requires_grad is not frozen

    def test_a_copy_is_undone_on_its_own(self) -> None:
        net = self.net()
        swap_norms(net, "mean")
        twin = copy.deepcopy(net)
        swap_norms(twin, "l2")
        assert (type(net[1]), net[1].weight.requires_grad) == (MeanOnlyBatchNorm2d, False)
        assert (type(twin[1]), twin[1].weight.requires_grad) == (nn.BatchNorm2d, True)

    @pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
    def test_layers_that_lack_what_it_drops(self, settings: dict[str, Any]) -> None:
        net, x = nn.Sequential(nn.BatchNorm2d(3, **settings)), images()
        swap_norms(net, "mean")
        torch.testing.assert_close(net(x), x - x.mean((0, 2, 3), keepdim=True))
        swap_norms(net, "l2")
        torch.testing.assert_close(net(x), nn.BatchNorm2d(3, **settings)(x))

    def test_synchronised_torchs_comes_back(self) -> None:
        net = nn.Sequential(nn.SyncBatchNorm(3))
        swap_norms(net, "mean")
        assert (type(net[0]), net[0].sync) == (MeanOnlyBatchNorm, True)
        swap_norms(net, "l2")
        assert type(net[0]) is nn.SyncBatchNorm


class TestSynchronised:
    def test_sync_batch_norm_becomes_a_synchronised_norm_and_comes_back(self) -> None:
        group = object()
        net = nn.Sequential(nn.SyncBatchNorm(3))
        net[0].process_group = group
        swap_norms(net, "l1")
        assert type(net[0]) is ours.L1BatchNorm
        assert net[0].sync
        assert net[0].process_group is group
        assert len(swap_norms(net, "l1")) == 0
        swap_norms(net, "top10")
        assert net[0].sync
        swap_norms(net, "l2")
        assert type(net[0]) is nn.SyncBatchNorm
        assert net[0].process_group is group

    def test_ours_that_synchronises_becomes_torchs_that_does(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3))
        swap_norms(net, "l1", {"sync": True})
        swap_norms(net, "l2")
        assert type(net[0]) is nn.SyncBatchNorm
        assert net[0].eval()(images()).shape == (4, 3, 8, 8)


class MyRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


class MyNorm(nn.RMSNorm):
    pass


class TestRMSNorm:
    def net(self) -> nn.Sequential:
        return nn.Sequential(nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8), nn.RMSNorm(8))

    def test_by_kinds_and_l2_undoes(self) -> None:
        net, x = self.net(), torch.randn(4, 8)
        expected = net(x)
        weight = net[0].weight
        assert str(swap_norms(net, "l1", kinds=["rms"])) == "swapped 2 RMSNorm → L1RMSNorm"
        assert classes(net)[1:] == [L1RMSNorm, nn.LayerNorm, L1RMSNorm]
        assert (net[0].eps, net[2].eps) == (1e-3, None)
        assert net[0].weight is weight
        torch.testing.assert_close(net[0](x), L1RMSNorm(8, eps=1e-3)(x))
        assert len(swap_norms(net, "l1", kinds=["rms"])) == 0
        swap_norms(net, "lp", {"p": 3}, kinds=["rms", "layer"])
        assert classes(net)[1:] == [LpRMSNorm, LpLayerNorm, LpRMSNorm]
        swap_norms(net, "l2", kinds=["layer", "rms"])
        assert classes(net) == classes(self.net())
        assert vars(net[0]).keys() == vars(nn.RMSNorm(8)).keys()
        assert torch.equal(net(x), expected)

    @pytest.mark.parametrize(
        ("norm", "reason"),
        [
            (MyRMSNorm(), "a class of its own, and only torch's RMSNorm is swapped"),
            (MyNorm(8), "a subclass, and only exact types are swapped"),
            (timm.layers.RmsNorm(8), "a class of its own, and only torch's RMSNorm is swapped"),
        ],
    )
    def test_others_are_left_with_the_reason(self, norm: nn.Module, reason: str) -> None:
        net = nn.Sequential(nn.RMSNorm(8), norm)
        report = swap_norms(net, "l1", kinds=["rms"])
        assert [(left.name, left.reason) for left in report.left] == [("1", reason)]
        assert reason in refusal(net, "l1", kinds=["rms"], include=["1"])
        assert "There is no RMS norm to swap" in refusal(nn.Sequential(norm), kinds=["rms"])


class TestLayerNorm:
    @pytest.mark.parametrize("bias", [True, False])
    def test_by_kinds(self, bias: bool) -> None:
        net = nn.Sequential(nn.LayerNorm(8, bias=bias), nn.BatchNorm1d(8))
        swap_norms(net, "l1", kinds=["layer"])
        assert classes(net)[1:] == [L1LayerNorm, nn.BatchNorm1d]
        x = torch.randn(4, 8)
        torch.testing.assert_close(net[0](x), L1LayerNorm(8)(x))
        swap_norms(net, "lp", {"p": 3}, kinds=["batch", "layer"])
        assert classes(net)[1:] == [LpLayerNorm, ours.LpBatchNorm1d]
        assert (net[0].p, net[1].p) == (3, 3)
        swap_norms(net, "l2", kinds=["layer"])
        assert classes(net)[1:] == [nn.LayerNorm, ours.LpBatchNorm1d]


def build(library: str, name: str) -> nn.Module:
    more = MORE_ARGUMENTS.get(name, {})
    if library == "timm":
        return timm.create_model(name, num_classes=3, **more)
    return torchvision.models.get_model(name, weights=None, num_classes=3, **more)


@pytest.mark.parametrize(("library", "name", "norm"), ARCHITECTURES)
def test_every_batch_norm_swaps_and_trains_a_step(library: str, name: str, norm: str) -> None:
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

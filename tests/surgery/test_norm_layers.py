"""Test what a swap does to timm's norms, to torch's encoder, and to what `torch.compile` wraps."""

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

from nmlightning import swap_norms
from nmlightning.norms import batch_norm as ours


def small_net() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


class TestTimm:
    def net(self) -> nn.Sequential:
        norm = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        norm.drop.p = 0.5
        return nn.Sequential(nn.Conv2d(3, 3, 1), norm)

    @pytest.mark.parametrize("norms", [["l1"], ["l1", "linf"], ["top10", "l2", "l1"]])
    def test_drop_and_activation_run_once_and_l2_undoes(self, norms: list[str]) -> None:
        net, x = self.net(), images()
        original = copy.deepcopy(net)
        for norm in norms:
            swap_norms(net, norm)
        bare = {"l1": ours.L1BatchNorm2d, "linf": ours.LInfBatchNorm2d}[norms[-1]](3)
        torch.manual_seed(1)
        expected = nn.functional.silu(nn.functional.dropout(bare(net[0](x))))
        torch.manual_seed(1)
        torch.testing.assert_close(net(x), expected)
        swap_norms(net, "l2")
        assert type(net[1]) is timm.layers.BatchNormAct2d
        assert net[1].__dict__.keys() == original[1].__dict__.keys()
        assert not net[1]._forward_hooks
        assert len(swap_norms(net, "l2")) == 0

    def test_a_copy_is_undone_on_its_own(self) -> None:
        net, x = self.net().eval(), images()
        expected = net(x)
        swap_norms(net, "l1")
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin(x), expected)
            swap_norms(twin, "l2")
            assert type(twin[1]) is timm.layers.BatchNormAct2d
            torch.testing.assert_close(twin(x), expected)
        assert type(net[1]) is ours.L1BatchNorm2d
        torch.testing.assert_close(net(x), expected)


def test_evaluation_of_torchs_encoder_computes_the_swapped_norm() -> None:
    """Its fused kernel computes L2 by the norms' weights, whatever class they have."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fused_l2 = layer.eval()(x)
        swap_norms(layer, "l1", kinds=["layer"])
        swapped = layer(x)
        torch.testing.assert_close(swapped, layer.train()(x))
        assert (swapped - fused_l2).abs().max() > 1e-2
        swap_norms(layer, "l2", kinds=["layer"])
        torch.testing.assert_close(layer.eval()(x), fused_l2)
    assert layer.activation_relu_or_gelu == 1


class TestCompiled:
    def test_names_are_without_its_prefix(self) -> None:
        net = nn.Sequential(torch.compile(small_net(), backend="eager"))
        norm = torch.compile(nn.BatchNorm2d(3), backend="eager")
        assert [s.name for s in swap_norms(net, include=["0.1", "0.3.*"]).swapped] == [
            "0.1",
            "0.3.1",
        ]
        assert [s.name for s in swap_norms(nn.Sequential(norm), include=["0"]).swapped] == ["0"]

    # What torch 2.11's compiler does with an autograd function, and warns of itself.
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
    @pytest.mark.parametrize("norm", ["linf", "mean"])
    def test_a_net_that_was_compiled_and_ran_computes_the_swapped_norm(self, norm: str) -> None:
        net, x = small_net(), images()
        compiled = torch.compile(net, backend="eager")
        compiled(x)
        swap_norms(compiled, norm)
        torch.testing.assert_close(compiled(x), net(x))

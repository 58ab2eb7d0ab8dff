"""Test swaps of timm's norms, torch's encoder, compiled nets, and to norms without a scale."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nmlightning import norms, swap_norms


class TestTimm:
    @pytest.fixture
    def net(self) -> nn.Sequential:
        norm = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        norm.drop.p = 0.5
        return nn.Sequential(nn.Conv2d(3, 3, 1), norm)

    @pytest.mark.parametrize("names", [["l1"], ["l1", "linf"], ["top10", "l2", "l1"]])
    def test_drop_and_activation_run_once_and_l2_reverts(
        self, net: nn.Sequential, images: Tensor, names: list[str]
    ) -> None:
        original = copy.deepcopy(net)
        for name in names:
            swap_norms(net, name)
        bare = {"l1": norms.L1BatchNorm2d, "linf": norms.LInfBatchNorm2d}[names[-1]](3)
        torch.manual_seed(1)
        expected = nn.functional.silu(nn.functional.dropout(bare(net[0](images))))
        torch.manual_seed(1)
        torch.testing.assert_close(net(images), expected)
        swap_norms(net, "l2")
        assert type(net[1]) is timm.layers.BatchNormAct2d
        assert net[1].__dict__.keys() == original[1].__dict__.keys()
        assert len(swap_norms(net, "l2")) == 0


def _reload(net: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(net))


def _compile(net: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(net, backend="eager", fullgraph=True)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
class TestTransformerEncoder:
    """Its fused kernel computes L2 by the norms' weights, whatever class they have."""

    @pytest.fixture(params=[False, True], ids=["post_norm", "pre_norm"])
    def layer(self, request: pytest.FixtureRequest) -> nn.TransformerEncoderLayer:
        settings = {"dropout": 0.0, "batch_first": True, "norm_first": request.param}
        return nn.TransformerEncoderLayer(8, 2, 16, **settings)

    @pytest.mark.parametrize(("norm", "options"), [("l1", {}), ("lp", {"p": 3})])
    @pytest.mark.parametrize("depth", [0, 2])
    @torch.no_grad()
    def test_swapped_evaluates_as_it_trains(
        self, layer: nn.Module, depth: int, norm: str, options: dict[str, Any]
    ) -> None:
        net = nn.TransformerEncoder(layer, depth, nn.LayerNorm(8)) if depth else layer
        x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
        state = [vars(module).copy() for module in net.modules()]
        l2 = net.eval()(x, src_key_padding_mask=padding)
        swap_norms(net, norm, options, kinds="layer")
        swapped = net(x, src_key_padding_mask=padding)
        trained = net.train()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(swapped, trained, rtol=0, atol=1e-5)
        assert (swapped - l2)[~padding].abs().max() > 1e-2
        swap_norms(net, "l2", kinds="layer")
        assert torch.equal(net.eval()(x, src_key_padding_mask=padding), l2)
        assert [vars(module).keys() for module in net.modules()] == [s.keys() for s in state]

    @pytest.mark.parametrize("then", [lambda net: net, copy.deepcopy, _reload, _compile])
    @pytest.mark.parametrize("put", [setattr, lambda part, *norm: part._modules.update([norm])])
    @torch.no_grad()
    def test_norm_put_there_by_hand_is_what_evaluates(
        self, layer: Any, put: Any, then: Any
    ) -> None:
        x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
        net: Any = nn.TransformerEncoder(layer, 2)
        for part in (layer, net.layers[1]):
            put(part, "norm1", norms.L1LayerNorm(8))
        for other in (layer, nn.TransformerEncoder(layer, 1), net):
            for mask in (None, padding):
                expected = other.train()(x, src_key_padding_mask=mask)
                y = then(other.eval())(x, src_key_padding_mask=mask)
                seen = slice(None) if mask is None else ~mask  # torch makes the others 0
                torch.testing.assert_close(y[seen], expected[seen], rtol=0, atol=1e-5)
        assert [*layer.modules()][-1] is layer.dropout2


class TestCompiled:
    def test_names_leave_out_the_compile_prefix(self, net: nn.Sequential) -> None:
        net = nn.Sequential(torch.compile(net, backend="eager"))
        norm = torch.compile(nn.BatchNorm2d(3), backend="eager")
        swapped = swap_norms(net, include=["0.1", "0.3.*"]).swapped
        assert [s.name for s in swapped] == ["0.1", "0.3.1"]
        assert [s.name for s in swap_norms(nn.Sequential(norm), include=["0"]).swapped] == ["0"]

    # What torch 2.11's compiler does with an autograd function, and warns of itself.
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
    @pytest.mark.parametrize("norm", ["linf", "mean"])
    def test_compiled_net_computes_the_swapped_norm(
        self, net: nn.Sequential, images: Tensor, norm: str
    ) -> None:
        compiled = torch.compile(net, backend="eager")
        compiled(images)
        swap_norms(compiled, norm)
        torch.testing.assert_close(compiled(images), net(images))


class TestMeanOnly:
    """The one norm without a scale: its layers have the weight, which is 1 and learns nothing."""

    @pytest.fixture
    def net(self, net: nn.Sequential, images: Tensor) -> nn.Sequential:
        """A net in which no scale is 1, and one is 0 at first, as in residual branches."""
        nn.init.normal_(net[1].weight, mean=3.0)
        nn.init.zeros_(net[3][1].weight)
        net(5 * images)
        return net

    def test_swap_drops_the_scale_and_keeps_mean_and_bias(
        self, net: nn.Sequential, images: Tensor
    ) -> None:
        norm, x = net[1], torch.randn(4, 8, 2, 2)
        shift = (norm.bias - norm.running_mean).view(-1, 1, 1)
        swap_norms(net, "mean")
        torch.testing.assert_close(norm.eval()(x), x + shift)
        assert net(images).std() > 0.1

    def test_earlier_optimizer_trains_only_the_biases(
        self, net: nn.Sequential, images: Tensor
    ) -> None:
        norms = (net[1], net[3][1])
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        net(images).square().sum().backward()
        ids = [id(q) for q in net.parameters()]
        swap_norms(net, "mean")
        before = [norm.bias.detach().clone() for norm in norms]
        for _ in range(2):  # The gradients of the first step are from before the swap.
            optimizer.step()
            net(images).square().sum().backward()
        assert [id(q) for q in net.parameters()] == ids
        for norm, bias in zip(norms, before, strict=True):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not torch.equal(norm.bias, bias)

    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_next_norm_evaluates_alike_and_its_weight_learns(
        self, net: nn.Sequential, images: Tensor, norm: str
    ) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        swap_norms(net, "mean")
        net(images)
        expected = net.eval()(images)
        swap_norms(net, norm)
        torch.testing.assert_close(net(images), expected, rtol=0, atol=0)
        net.train()(images).pow(3).sum().backward()
        optimizer.step()
        assert not torch.equal(net[1].weight, torch.ones(8))

    def test_frozen_weight_stays_frozen(self, net: nn.Sequential) -> None:
        net[1].weight.requires_grad_(False)
        for norm, options in (("mean", {}), ("mean", {"eps": 0.1}), ("l2", {})):
            swap_norms(net, norm, options)
            weights = (net[1].weight.requires_grad, net[3][1].weight.requires_grad)
            assert weights == (False, norm == "l2")
            variance = {"mean": 1 - net[1].eps, "l2": 0.9}[norm]
            torch.testing.assert_close(net[1].running_var, torch.full((8,), variance))

    def test_weight_unfrozen_between_swaps_learns(self, net: nn.Sequential) -> None:
        for frozen in (True, False):
            net[1].weight.requires_grad_(not frozen)
            swap_norms(net, "mean")
            swap_norms(net, "l2")
            assert net[1].weight.requires_grad is not frozen

    def test_copy_reverts_on_its_own(self, net: nn.Sequential) -> None:
        swap_norms(net, "mean")
        twin = copy.deepcopy(net)
        swap_norms(twin, "l2")
        assert (type(net[1]), net[1].weight.requires_grad) == (norms.MeanOnlyBatchNorm2d, False)
        assert (type(twin[1]), twin[1].weight.requires_grad) == (nn.BatchNorm2d, True)

    @pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}])
    def test_layers_without_weight_or_statistics(
        self, images: Tensor, settings: dict[str, Any]
    ) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3, **settings))
        swap_norms(net, "mean")
        torch.testing.assert_close(net(images), images - images.mean((0, 2, 3), keepdim=True))
        swap_norms(net, "l2")
        torch.testing.assert_close(net(images), nn.BatchNorm2d(3, **settings)(images))

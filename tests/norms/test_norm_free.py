"""Norm-free layers: the definitions, what a swap adds and takes, and how they train and export."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import gradients
from lightning_modules import PlModule, fit
from nmlightning import NormSwap, norms, parameter_groups, swap_norms
from nmlightning.errors import InputError
from nmlightning.export.export import export_network
from nmlightning.surgery.checkpoints import load_from_checkpoint

CLASSES = (norms.DynamicTanh, norms.DynamicErf, norms.RMSDynamicTanh, norms.RMSDynamicErf)
KINDS = ("layer", "rms")
every_class = pytest.mark.parametrize("cls", CLASSES)
every_name = pytest.mark.parametrize("name", ["dyt", "derf"])


def define(layer: Any, x: Tensor) -> Tensor:
    """Return what the papers write, erf as an integral's table has it: by its own derivative."""
    z = layer.alpha * x + getattr(layer, "shift", 0.0)
    y = torch.special.erf(z) if hasattr(layer, "shift") else 1 - 2 / (torch.exp(2 * z) + 1)
    y = y * layer.weight
    return y if isinstance(layer, nn.RMSNorm) else y + layer.bias


@every_class
def test_output_and_gradients_equal_the_definition(cls: Any) -> None:
    layer = cls(6, dtype=torch.float64, alpha_init=0.7)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=0.5)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = define(layer, x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(gradients(layer(x), leaves), gradients(expected, leaves))
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), leaves)


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_right_whatever_the_size(cls: Any, dtype: torch.dtype) -> None:
    layer = cls(64)
    for size in (1e-4, 1.0, 6e4):
        x = (size * torch.randn(8, 64)).clamp(-6e4, 6e4).to(dtype)
        y = layer.to(dtype)(x)
        assert y.dtype == dtype
        error = (y.float() - define(copy.deepcopy(layer).float(), x.float())).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * y.float().abs().max()


@every_class
def test_arguments_are_torchs_and_alpha(cls: Any) -> None:
    layer = cls(8, 1e-3, False, alpha_init=2.0)
    assert (layer.eps, layer.weight, layer.alpha.tolist()) == (1e-3, None, [2.0])
    again = eval(f"norms.{layer!r}")
    assert repr(again) == repr(layer)
    nn.init.zeros_(layer.alpha)
    layer.reset_parameters()
    assert layer.alpha.item() == 2.0
    for wrong in (0, -1.0, float("nan"), "0.5"):
        with pytest.raises(InputError, match="alpha_init"):
            cls(8, alpha_init=wrong)
    with pytest.raises(InputError, match="normalises the last dimensions"):
        cls(8)(torch.randn(2, 7))


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.RMSNorm(3))


@every_name
def test_swap_adds_scalars_and_swap_back_removes_them(name: str) -> None:
    net = make_net().double()
    keys, x = list(net.state_dict()), torch.randn(5, 4, dtype=torch.float64)
    before = net(x)
    weights = list(net.parameters())
    swap_norms(net, name, {"alpha_init": 0.3}, kinds=KINDS)
    added = [k for k in net.state_dict() if k not in keys]
    assert added == [f"{i}.{x}" for i in (1, 3) for x in ("alpha", "shift")[: 1 + (name == "derf")]]
    assert net.state_dict()["1.alpha"].item() == pytest.approx(0.3)
    assert net.state_dict()["1.alpha"].dtype == torch.float64
    assert not swap_norms(net, name, {"alpha_init": 0.3}, kinds=KINDS)  # nothing left to do
    groups = parameter_groups(net, 0.1, scope="no_norm")
    decayed = {id(q) for group in groups if group["weight_decay"] for q in group["params"]}
    assert decayed.isdisjoint(id(net.get_parameter(key)) for key in added)
    swap_norms(net, "l1", kinds=KINDS)
    assert list(net.state_dict()) == keys
    swap_norms(net, "l2", kinds=KINDS)
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_swap_of_other_libraries_norms() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_convnext", num_classes=3)
    keys = list(net.state_dict())
    swap_norms(net, "derf", kinds="layer")
    assert net(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert sum(key.endswith(".shift") for key in net.state_dict()) > 5
    swap_norms(net, "l2", kinds="layer")
    assert list(net.state_dict()) == keys


class Tokens(PlModule):
    """Its tokens are the rows of an image."""

    def build(self) -> None:
        layers = [nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.RMSNorm(3)]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3))


@every_name
def test_alpha_trains_and_is_in_the_checkpoint(name: str, tmp_path: Any) -> None:
    module = Tokens()
    trainer = fit(module, NormSwap(name, kinds=KINDS))
    alphas = [module.net[i].alpha.item() for i in (1, 3)]
    assert 0.5 not in alphas
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(Tokens, tmp_path / "x.ckpt")
    assert [loaded.net[i].alpha.item() for i in (1, 3)] == alphas
    exported = export_network(loaded.net, tmp_path / "x.onnx", "onnx", (2, 8, 8))
    assert exported.difference < 1e-6


@every_class
def test_compiles_in_one_graph(cls: Any) -> None:
    layer, x = cls(6), torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))

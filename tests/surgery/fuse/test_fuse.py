"""Test fused norms in networks that people use, and all that is done to such networks later."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn

from lightning_modules import PlLate, PlModule, fit
from nmlightning import NormSwap, export_network, fold_norms, probe_norms, swap_norms
from nmlightning.compat import _SyncKeepingOurs
from nmlightning.models import VGG, CifarResNet
from nmlightning.surgery.fuse.fuse import fused_norms, unfuse, unfused

# How many norms do a ReLU, how many an addition and a ReLU, and why the others do neither.
LAST = "it is the last of its Sequential"
NETWORKS: dict[str, tuple[int, int, set[str]]] = {
    "ours resnet": (4, 3, set()),
    "ours vgg": (8, 0, set()),
    "torchvision resnet18": (9, 8, {LAST}),
    "torchvision resnet50": (33, 16, {LAST}),
    "torchvision vgg11_bn": (8, 0, set()),
    "timm resnet18": (9, 8, {LAST}),
    "timm resnet26d": (19, 8, {LAST}),
    "timm regnetx_002": (27, 0, {"nothing follows it in ConvNormAct"}),
    "torchvision mobilenet_v2": (0, 0, {"ReLU6 follows it", LAST}),
    "timm efficientnet_b0": (0, 0, {"its own activation is SiLU", "nothing follows it"}),
}


def build(network: str) -> nn.Module:
    library, name = network.split()
    if library == "ours":
        return CifarResNet(8) if name == "resnet" else VGG(11, width=4)
    if library == "timm":
        return timm.create_model(name, num_classes=3)
    return torchvision.models.get_model(name, weights=None, num_classes=3)


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def spread_out(net: nn.Module) -> nn.Module:
    """Give the norms weights and biases that are not alike, among them negative ones."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.normal_(1, 0.5)
                module.bias.normal_(0, 0.5)
    return net


def unfused_copy(net: nn.Module) -> nn.Module:
    twin = copy.deepcopy(net)
    unfuse(twin)
    return twin


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_train_the_same(name: str) -> None:
    relus, sums, reasons = NETWORKS[name]
    net = spread_out(build(name))
    report = swap_norms(net, "l1", fuse="add_relu")
    kinds = [s.after for s in report.fused]
    assert (kinds.count("relu"), kinds.count("add_relu")) == (relus, sums)
    given = {s.reason for s in report.not_fused}
    assert all(any(reason in g for g in given) for reason in reasons)
    assert bool(given) == bool(reasons)
    twin = unfused_copy(net)
    if not report.fused:
        return
    outcomes = []
    for model in (net, twin):
        torch.manual_seed(0)
        loss = model(images()).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        outcomes.append([loss, *gradients, model.eval()(images())])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max())
        )


def timm_net() -> nn.Module:
    return spread_out(nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4)))


def test_timm_activation_is_fused_and_unfused() -> None:
    net = timm_net()
    norm = net[1]
    swap_norms(net, "l1")
    expected = net(images())
    assert str(swap_norms(net, "l1", fuse="relu")).endswith("fused 1 with the ReLU after them")
    assert re.match(r"L1BatchNormAct2d\(\n  4, .*, fused='relu'", repr(norm))
    torch.testing.assert_close(net(images()), expected)
    twin = copy.deepcopy(net)
    for model in (net, twin):
        swap_norms(model, "linf", fuse="add_relu")
        assert re.match(r"LInfBatchNormAct2d\(\n  4, .*, fused='relu'", repr(model[1]))
        swap_norms(model, "l1")
        torch.testing.assert_close(model(images()), expected)
        swap_norms(model, "l1", fuse="relu")
        swap_norms(model, "l2")
        assert type(model[1]) is timm.layers.BatchNormAct2d


def test_timm_activation_with_hooks_is_refused() -> None:
    for name in ("1", "1.act"):
        net = timm_net()
        net.get_submodule(name).register_forward_hook(lambda *_: None)
        (left,) = swap_norms(net, "l1", fuse="relu").not_fused
        assert left.reason == "it or its activation has hooks"


def fused_resnet() -> nn.Module:
    net = spread_out(CifarResNet(8))
    swap_norms(net, "l1", fuse="add_relu")
    net(images())  # so that the running statistics are something
    return net


@pytest.mark.parametrize("suffix", ["pt", "onnx", "pt2"])
def test_export_network_leaves_the_network_fused(suffix: str, tmp_path: Path) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    format = {"pt": "state_dict", "onnx": "onnx", "pt2": "torch_export"}[suffix]
    net = fused_resnet()
    report = export_network(net, tmp_path / f"net.{suffix}", format, (3, 32, 32))
    assert report.difference < 1e-5
    assert len(report.fold.folded) == 7
    assert len(fused_norms(net)) == 7


def test_fold_norms_unfuses() -> None:
    net = fused_resnet().eval()
    expected = net(images())
    assert len(fold_norms(net)) == 7
    torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-4)


def test_probe_norms_measures_unfused_norms() -> None:
    net = fused_resnet()
    twin = unfused_copy(net)
    seen = [
        probe_norms(model, [images()], lambda net, x: net(x).square().mean())
        for model in (net, twin)
    ]
    assert seen[0].layers == seen[1].layers or [x.outcomes for x in seen[0].layers] == [
        x.outcomes for x in seen[1].layers
    ]
    assert len(fused_norms(net)) == 7


@pytest.mark.parametrize("made", [PlModule, PlLate])
def test_norm_swap_resumes_with_or_without_fuse(made: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = made()
    trainer = fit(module, NormSwap("l1", fuse="relu"))
    assert list(fused_norms(module).values()) == ["relu"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = made()
    fit(plain, NormSwap("l1"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    fit(module, NormSwap("l1", fuse="relu"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert fused_norms(plain) == {}
    torch.testing.assert_close([*module.parameters()], [*plain.parameters()])


def test_sync_batchnorm_keeps_norms_fused() -> None:
    module = PlModule()
    swap_norms(module, "l1", fuse="relu")
    _SyncKeepingOurs(TorchSyncBatchNorm(), unfused).apply(module)
    assert list(fused_norms(module).values()) == ["relu"]
    assert module.net[1].sync


# Dynamo of torch 2.11 instantiates any autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fuse", [None, "add_relu"])
def test_compiled_norms_save_no_more_than_torchs(fuse: str | None) -> None:
    """And no mask: of the ReLU whose output nothing else needs, torch keeps one for any norm."""

    def kept(net: nn.Module) -> list[tuple[torch.dtype, int]]:
        tensors: list[tuple[torch.dtype, int]] = []

        def keep(tensor: Tensor) -> Tensor:
            tensors.append((tensor.dtype, tensor.numel()))
            return tensor

        compiled = torch.compile(net, fullgraph=True, backend="aot_eager_decomp_partition")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compiled(images(12))
        return tensors

    plain, net = CifarResNet(8), CifarResNet(8)
    swap_norms(net, "l1", fuse=fuse)
    theirs, ours = kept(plain), kept(net)
    assert sum(count for _, count in ours) <= sum(count for _, count in theirs)
    masks = [[t for t in tensors if t[0] == torch.bool] for tensors in (ours, theirs)]
    assert masks[0] == masks[1]

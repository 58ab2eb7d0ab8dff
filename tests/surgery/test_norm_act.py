"""Test swapped norms of timm's that also activate: classes that are both ours and timm's."""

import copy
import io
import warnings

import pytest
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from nmlightning import norms, swap_norms
from nmlightning.export.fold import fold_norms


@pytest.fixture
def net() -> nn.Module:
    """A small net of timm's, swapped, with running statistics that are something."""
    net = timm.create_model("lcnet_050", num_classes=10)
    swap_norms(net, "l1")
    for _ in range(3):
        net(torch.randn(4, 3, 64, 64))
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def test_class_and_report_show_the_activation() -> None:
    net = timm.create_model("lcnet_050")
    report = swap_norms(net, "l1")
    assert {swap.after for swap in report.swapped} == {"L1BatchNormAct2d"}
    assert str(report) == "swapped 27 BatchNormAct2d → L1BatchNormAct2d"
    assert isinstance(net.bn1, norms.L1BatchNorm2d)
    assert isinstance(net.bn1, timm.layers.BatchNormAct2d)
    assert not net.bn1._forward_hooks
    rebuilt = type(net.bn1)(8, net.bn1.eps, net.bn1.momentum)
    assert type(rebuilt.act) is nn.ReLU
    assert len(swap_norms(net, "l2")) == 27
    assert type(net.bn1) is timm.layers.BatchNormAct2d


def test_every_norm_folds(net: nn.Module, x: Tensor) -> None:
    expected = net(x)
    assert len(fold_norms(net)) == 27
    torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-4)


def test_frozen_copied_saved_and_scripted_nets_compute_the_same(net: nn.Module, x: Tensor) -> None:
    expected = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    frozen = freeze_batch_norm_2d(copy.deepcopy(net))
    loaded = torch.load(file, weights_only=False)
    plain = timm.create_model("lcnet_050", num_classes=10).eval()
    plain.load_state_dict(net.state_dict())
    features = create_feature_extractor(net, ["classifier"])
    for other in (frozen, loaded, plain, lambda x: features(x)["classifier"]):
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    assert type(loaded.bn1) is type(net.bn1)
    swap_norms(loaded, "l2")
    assert type(loaded.bn1) is timm.layers.BatchNormAct2d
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.testing.assert_close(torch.jit.script(net)(x), expected)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)
    alone, inner = torch.fx.symbolic_trace(net.bn1), torch.randn(2, net.bn1.num_features, 4, 4)
    torch.testing.assert_close(alone(inner), net.bn1(inner))


def test_sync_conversion_before_the_swap_is_kept(x: Tensor) -> None:
    net = timm.create_model("efficientnet_b0", num_classes=10)
    synchronised = timm.layers.convert_sync_batchnorm(net)
    expected = synchronised.eval()(x)
    swap_norms(synchronised, "l1")
    assert isinstance(synchronised.bn1, timm.layers.BatchNormAct2d)
    assert synchronised.bn1.sync
    torch.testing.assert_close(synchronised(x), expected)
    swap_norms(synchronised, "l2")
    assert type(synchronised.bn1) is timm.layers.SyncBatchNormAct
    torch.testing.assert_close(synchronised(x), expected)

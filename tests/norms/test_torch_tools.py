"""What people do with a batch norm after training works on ours: fold, export, update_bn."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from nmlightning.norms.batch_norm import L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm2d
from nmlightning.surgery.swap import swap_norms

CLASSES = [L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d, MeanOnlyBatchNorm2d]


def trained_net(norm_class: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm_class(8)).double()
    if net[1].weight.requires_grad:
        nn.init.uniform_(net[1].weight, -2, 2)
    nn.init.normal_(net[1].bias)
    for _ in range(3):
        net(1 + 2 * images())
    return net.eval()


def images() -> Tensor:
    return torch.randn(6, 3, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize("norm_class", CLASSES)
def test_folds_into_a_convolution(norm_class: type[nn.Module]) -> None:
    net = trained_net(norm_class)
    x = images()
    folded = fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_class", CLASSES)
def test_exports_as_torch_batch_norm(norm_class: type[nn.Module]) -> None:
    net = trained_net(norm_class)
    x = images()
    exported = torch.export.export(net, (x,))
    assert torch.equal(exported.module()(x), net(x))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called == {"aten.conv2d.default", "aten.batch_norm.default"}


@pytest.mark.parametrize("norm_class", CLASSES)
def test_update_bn_averages_all_batches(norm_class: type[nn.Module]) -> None:
    net = trained_net(norm_class)
    batches = [images(), 3 * images() - 1]
    expected = torch.zeros(8, dtype=torch.float64)
    for batch in batches:
        alone = norm_class(8).double()
        alone.momentum = 1.0
        alone(net[0](batch))
        expected += alone.running_var / len(batches)
    update_bn(batches, net)
    torch.testing.assert_close(net[1].running_var, expected)
    assert net[1].momentum == 0.1


def test_folds_after_a_swap() -> None:
    net = trained_net(nn.BatchNorm2d)
    swap_norms(net, "l1")
    x = images()
    torch.testing.assert_close(fuse_conv_bn_eval(net[0], net[1])(x), net(x), rtol=0, atol=1e-12)

"""Test fold_norms against the formula in float64, and that it leaves what it cannot fold."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from nmlightning import InputError, fold_norms
from nmlightning.norms import L1BatchNorm2d, LInfBatchNorm1d, MeanOnlyBatchNorm2d

# Of the outputs, which are of order 1: float32 rounds each of some hundred terms to 6e-8.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def stir(net: nn.Module) -> nn.Module:
    """Give every norm statistics and weights that no mistake leaves alone; in evaluation."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                if not isinstance(module, MeanOnlyBatchNorm2d):
                    module.running_var.uniform_(0.2, 2)
            if module.affine and not isinstance(module, MeanOnlyBatchNorm2d):
                nn.init.uniform_(module.weight, -2, 2)
            if module.affine:
                nn.init.normal_(module.bias)
    return net.eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 8, 8)),
    "Conv2d with bias": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 8)),
    "Conv2d, reflecting": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (4, 8, 8),
    ),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2, bias=False), (4, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (4, 8, 8)),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 8, 8)),
    "ConvTranspose3d, groups": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), (4, 4, 4, 4)),
    "Linear": (lambda: nn.Linear(4, 6), (4,)),
    "Linear without bias": (lambda: nn.Linear(4, 6, bias=False), (4,)),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norm_for(shape: tuple[int, ...], **options: Any) -> nn.Module:
    return NORMS[max(len(shape) - 2, 0)](6, **options)


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_fold_norms_computes_the_formula(name: str, affine: bool, keep_norms: bool) -> None:
    make, shape = LAYERS[name]
    net = stir(nn.Sequential(make(), norm_for(shape, affine=affine, eps=1e-3)))
    x = torch.randn(3, *shape)
    layer, norm = (copy.deepcopy(part).double() for part in net)
    y = layer(x.double())
    column = (-1, *[1] * (len(shape) - 1))
    y = (y - norm.running_mean.view(column)) / (norm.running_var.view(column) + 1e-3).sqrt()
    if affine:
        y = y * norm.weight.view(column) + norm.bias.view(column)
    keys = {key: value.shape for key, value in net.state_dict().items()}
    parameter = net[0].weight
    assert str(fold_norms(net, keep_norms=keep_norms)) == "folded 1 batch norm"
    torch.testing.assert_close(net(x), y.float(), **CLOSE)
    assert net[0].weight is parameter
    if keep_norms:
        assert {key: value.shape for key, value in net.state_dict().items()} == keys
        assert type(net[1]) is type(norm)
        torch.testing.assert_close(net[1].running_var, torch.full((6,), 1 - 1e-3))
    else:
        assert type(net[1]) is nn.Identity
        torch.testing.assert_close(net[0](x), y.float(), **CLOSE)


@torch.no_grad()
def test_fold_norms_of_a_channel_without_variance() -> None:
    net = stir(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    net[1].running_var[2] = 0  # so s is 316 times the weight
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    fold_norms(net)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_fold_norms_keeps_bfloat16() -> None:
    net = stir(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)).bfloat16())
    expected = copy.deepcopy(net).float()
    fold_norms(net)
    assert net[0].weight.dtype == net[0].bias.dtype == torch.bfloat16
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(net.float()(x), expected(x), rtol=0, atol=0.05)  # 2⁻⁸ of each weight


@pytest.mark.parametrize("keep_norms", [False, True])
def test_fold_norms_keeps_timms_activation(keep_norms: bool) -> None:
    net = stir(nn.Sequential(nn.Conv2d(3, 5, 3), timm.layers.BatchNormAct2d(5)))
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    assert expected.min() == 0
    assert len(fold_norms(net, keep_norms=keep_norms)) == 1
    torch.testing.assert_close(net(x), expected, **CLOSE)


# ---- what is left, and why ----


def block(
    forward: Callable[..., Tensor], *, conv: nn.Module | None = None, norm: nn.Module | None = None
) -> nn.Module:
    """Return a convolution and a norm that the forward calls in a way of its own."""
    net: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    net.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
    net.norm = norm or nn.BatchNorm2d(4)
    return net


def after_concat(self: Any, x: Tensor) -> Any:
    return self.norm(torch.cat([self.conv(x)[:, :2], x[:, :2]], 1))


def output_used_twice(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return self.norm(y) + y


FORWARDS: dict[str, tuple[Callable[..., Any], str]] = {
    "after add": (lambda self, x: self.norm(self.conv(x) + x), "it follows add"),
    "after concat": (after_concat, "it follows cat"),
    "pre-activation": (lambda self, x: self.conv(F.relu(self.norm(x))), "it follows an input of"),
    "output used twice": (output_used_twice, "the output of conv is used elsewhere, too"),
    "shared convolution": (
        lambda self, x: self.norm(self.conv(self.conv(x))),
        "the network calls conv 2 times",
    ),
    "shared norm": (lambda self, x: self.norm(self.conv(self.norm(x))), "the network calls it 2"),
    "weight read": (
        lambda self, x: self.norm(self.conv(x)) * self.conv.weight.mean(),
        "the weight of conv is used elsewhere, too",
    ),
    "norm read": (
        lambda self, x: self.norm(self.conv(x)) * self.norm.bias.mean(),
        "its state is used elsewhere, too",
    ),
    "by value": (
        lambda self, x: self.norm(self.conv(x)) if x.sum() > 0 else x,
        "the network cannot be traced by torch.fx: symbolically traced",
    ),
    "unused": (lambda self, x: self.conv(x), "the traced network has no call"),
}


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def straight(**parts: nn.Module) -> nn.Module:
    def forward(self: Any, x: Tensor, scale: Tensor | None = None) -> Any:
        y = self.conv(x)
        return self.norm(y if scale is None else y * scale)

    return block(forward, **parts)


def tied() -> nn.Module:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second)


def hooked(part: str) -> nn.Module:
    net = straight()
    net.get_submodule(part).register_forward_hook(lambda module, given, output: output * 2)
    return net


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{name: (partial(block, forward), reason) for name, (forward, reason) in FORWARDS.items()},
    "tied": (tied, "the weight of 0 is used elsewhere, too"),
    "no statistics": (
        lambda: straight(norm=L1BatchNorm2d(4, track_running_stats=False)),
        "it keeps no running statistics",
    ),
    "subclass of conv": (lambda: straight(conv=StandardisedConv(4, 4, 3)), "it follows Standardis"),
    "subclass of norm": (lambda: straight(norm=OwnNorm(4)), "OwnNorm is neither a batch norm"),
    "frozen": (
        lambda: straight(norm=torchvision.ops.FrozenBatchNorm2d(4)),
        "FrozenBatchNorm2d is neither a batch norm of torch",
    ),
    "hooked norm": (lambda: hooked("norm"), "it has hooks"),
    "hooked conv": (lambda: hooked("conv"), "conv has hooks"),
    "torch's weight norm": (
        lambda: straight(conv=parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
        "it follows ParametrizedConv2d with a parametrized weight",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_fold_norms_leaves_norms_with_the_reason(name: str) -> None:
    make, reason = LEFT[name]
    net = stir(make())
    x = torch.randn(2, 4, 6, 6)
    expected = net(x)
    report = fold_norms(net)
    assert report.folded == ()
    assert [left.reason.startswith(reason) for left in report.left] == [True], report.left
    assert torch.equal(net(x), expected)


def test_fold_norms_keeps_optional_arguments_at_their_default() -> None:
    net = stir(straight())
    x = torch.randn(2, 4, 6, 6)
    expected = net(x)
    assert len(fold_norms(net)) == 1
    torch.testing.assert_close(net(x), expected, **CLOSE)


def test_fold_norms_of_modules_with_two_names() -> None:
    net = straight()
    net.alias, net.other = net.conv, net.norm
    report = fold_norms(stir(net))
    assert [(fold.norm, fold.into) for fold in report.folded] == [("norm", "conv")]
    assert type(net.norm) is type(net.other) is nn.Identity
    assert net.alias is net.conv


def test_fold_norms_folds_the_rest_and_prints() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    net = stir(nn.Sequential(net, nn.Linear(48, 5), LInfBatchNorm1d(5)))
    x = torch.randn(2, 4, 6, 6)
    expected = net(x)
    report = fold_norms(net)
    torch.testing.assert_close(net(x), expected, **CLOSE)
    assert report.counts() == "folded 2 batch norms; 1 not folded"
    assert str(report).splitlines()[1].startswith(f"not folded {report.left[0].norm}: ")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report)
    lines = captured.get().splitlines()
    assert lines[0].strip() == report.counts()
    assert any(line.split() == ["0.2", "0.1"] for line in lines)
    assert any(
        line.startswith(" 0.0 ") and "not folded: it follows an input" in line for line in lines
    )


@pytest.mark.parametrize("part", ["", "1"])
def test_fold_norms_refuses_training(part: str) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    net.get_submodule(part).train()
    with pytest.raises(InputError, match=r"it is in training: call eval\(\) first"):
        fold_norms(net)


def test_fold_norms_refuses_a_text_for_a_flag() -> None:
    with pytest.raises(InputError, match="keep_norms is True or False, got 'no'"):
        fold_norms(nn.Sequential().eval(), keep_norms="no")

"""Residual networks for CIFAR and ImageNet (He et al., 2016): https://arxiv.org/abs/1512.03385."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from nmlightning.errors import InputError
from nmlightning.models.activation import Activation, initialise, make_activation, scale_down

WIDTHS = (16, 32, 64)


@torch.fx.wrap  # type: ignore[untyped-decorator, unused-ignore]
def take_every(x: Tensor, stride: int) -> Tensor:
    """Return every `stride`-th row and column of (N, C, H, W); the gradient has the layout of x."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x[:, :, ::stride, ::stride]
    # The gradient of a slice is contiguous in the order of the dimensions that are sliced.
    return x.movedim(1, 3)[:, ::stride, ::stride].movedim(3, 1)


class ZeroPadShortcut(nn.Module):
    """The paper's option A: every `stride`-th pixel, and zeros for the channels that are new.

    (N, C, H, W) → (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉), without a parameter.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        after = self.new_channels - before
        return F.pad(take_every(x, self.stride), (0, 0, 0, 0, before, after))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


class BasicBlock(nn.Module):
    """`act(bn2(conv2(act(bn1(conv1(x))))) + shortcut(x))`, two 3×3 convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: Activation
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = make_activation(activation)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = make_activation(activation)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same_shape else ZeroPadShortcut(in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        activated: Tensor = self.relu2(residual + self.shortcut(x))
        return activated


class CifarResNet(nn.Module):
    """A residual network for small images, 6n + 2 layers deep: three stages of n basic blocks.

    (N, in_channels, H, W) → (N, num_classes). Depths in the paper: 20, 32, 44, 56, 110.

    Args:
        depth: number of weighted layers; 6n + 2.
        num_classes: number of outputs.
        in_channels: channels of the images.
        activation: "relu", or "trelu" for `TReLU`, with the initialisation that fits.
        scale_branches: draw the last convolution of each of the n blocks 1/√n times as large, so
            that the sum of all branches has the variance of one. A deep network needs it where no
            norm divides by a scale, with `mean` norms and normalised weights; else it does nothing.

    Raises:
        InputError: if the depth is not 6n + 2, or there is no such activation.

    Examples:
        >>> import torch
        >>> CifarResNet(depth=20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 56,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Activation = "relu",
        scale_branches: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
            raise InputError(
                f"CifarResNet depth {depth!r} is not 6n + 2: choose 20, 32, 44, 56, 110 or another "
                "such."
            )
        blocks = (depth - 2) // 6  # in a stage
        self.activation = activation
        self.scale_branches = scale_branches
        narrow, middle, wide = WIDTHS
        self.conv1 = nn.Conv2d(in_channels, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu1 = make_activation(activation)
        self.layer1 = _stage(blocks, narrow, narrow, stride=1, activation=activation)
        self.layer2 = _stage(blocks, narrow, middle, stride=2, activation=activation)
        self.layer3 = _stage(blocks, middle, wide, stride=2, activation=activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions as He et al. (2015) do for the activation; the rest as torch."""
        initialise(self, self.activation)
        if self.scale_branches:
            scale_down([block.conv2 for block in self.modules() if isinstance(block, BasicBlock)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _stage(
    blocks: int, in_channels: int, out_channels: int, stride: int, activation: Activation
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, activation)
    others = (BasicBlock(out_channels, out_channels, 1, activation) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


class ResNet18(resnet.ResNet):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's ResNet-18: its parameters, their names, and how they are drawn.

    (N, 3, H, W) → (N, num_classes), with images of 32×32 or more; ImageNet's are 224×224.

    Args:
        num_classes: number of outputs.
        zero_init_residual: let the last norm of each block begin with a weight of 0.

    Examples:
        >>> import torch
        >>> ResNet18()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    def __init__(self, num_classes: int = 1000, zero_init_residual: bool = False) -> None:
        super().__init__(resnet.BasicBlock, [2, 2, 2, 2], num_classes, zero_init_residual)


class ResNet50(resnet.ResNet):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's ResNet-50: its parameters, their names, and how they are drawn.

    (N, 3, H, W) → (N, num_classes), with images of 32×32 or more; ImageNet's are 224×224.

    Args:
        num_classes: number of outputs.
        scale_branches: draw the last convolution of each of the n = 16 blocks 1/√n times as large;
            see `CifarResNet`.
        zero_init_residual: let the last norm of each block begin with a weight of 0.

    Examples:
        >>> import torch
        >>> ResNet50()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        scale_branches: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(resnet.Bottleneck, [3, 4, 6, 3], num_classes, zero_init_residual)
        if scale_branches:
            blocks = [part for part in self.modules() if isinstance(part, resnet.Bottleneck)]
            scale_down([block.conv3 for block in blocks])

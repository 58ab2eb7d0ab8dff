"""ResNets for ImageNet (He et al., 2016, https://arxiv.org/abs/1512.03385), as torchvision's."""

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from nmlightning.models.branch_scale import scale_down


class ResNet18(ResNet):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's ResNet-18: its parameters, their names, and how they are drawn.

    (N, 3, H, W) → (N, num_classes), with images of 32×32 or more; ImageNet's are 224×224.

    Args:
        num_classes: number of outputs.

    Example:
        >>> import torch
        >>> ResNet18()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)


class ResNet50(ResNet):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's ResNet-50: its parameters, their names, and how they are drawn.

    (N, 3, H, W) → (N, num_classes), with images of 32×32 or more; ImageNet's are 224×224.

    Args:
        num_classes: number of outputs.
        scale_branches: draw the last convolution of each of the n = 16 blocks 1/√n times as large;
            see `CifarResNet`.

    Example:
        >>> import torch
        >>> ResNet50()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
    """

    def __init__(self, num_classes: int = 1000, scale_branches: bool = False) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=num_classes)
        if scale_branches:
            scale_down([block.conv3 for block in self.modules() if isinstance(block, Bottleneck)])

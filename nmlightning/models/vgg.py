"""VGG with batch norm for small images (Simonyan & Zisserman, https://arxiv.org/abs/1409.1556)."""

from torch import Tensor, nn

from nmlightning.errors import InputError, check_whole_number
from nmlightning.models.activation import Activation, initialise, make_activation

STAGE_WIDTHS = (1, 2, 4, 8, 8)  # in units of `width`
CONVS_PER_STAGE = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """VGG-11, 13, 16 or 19 with batch norm and a single linear classifier.

    Five stages of 3×3 convolutions, each ended by a 2×2 max-pooling, so images of 32×32 or more.
    (N, in_channels, H, W) → (N, num_classes).

    Args:
        depth: 11, 13, 16 or 19 (the count of the original, which has two more linear layers).
        num_classes: number of outputs.
        in_channels: channels of the images.
        width: channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        activation: "relu", or "trelu" for `TReLU`, with the initialisation that fits.

    Raises:
        InputError: if there is no VGG of that depth or no such activation, or for a width below 1.

    Examples:
        >>> import torch
        >>> VGG(depth=11)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 11,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        if depth not in CONVS_PER_STAGE:
            raise InputError(f"There is no VGG of depth {depth}: choose 11, 13, 16 or 19.")
        check_whole_number("width", width)
        self.activation = activation
        layers: list[nn.Module] = []
        for convs, relative_width in zip(CONVS_PER_STAGE[depth], STAGE_WIDTHS, strict=True):
            channels = relative_width * width
            for _ in range(convs):
                layers += [
                    nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    make_activation(activation),
                ]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(STAGE_WIDTHS[-1] * width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the convolutions as He et al. (2015) do for the activation; the rest as torch."""
        initialise(self, self.activation)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits

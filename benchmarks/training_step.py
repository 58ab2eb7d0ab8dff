"""One step of training a network on random images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from interleaved import Call
from torch import Tensor, nn
from torch.optim import Optimizer

from nmlightning.models import VGG, CifarResNet

NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet8": (lambda: CifarResNet(8), 32),
    "resnet20": (lambda: CifarResNet(20), 32),
    "resnet56": (lambda: CifarResNet(56), 32),
    "vgg11": (lambda: VGG(11), 32),
    "resnet50": (torchvision.models.resnet50, 224),
}


@dataclass(frozen=True)
class Step:
    """A network, its optimizer, and one step of training it."""

    net: nn.Module
    optimizer: Optimizer
    run: Call


def draw_images(
    net_name: str,
    batch: int,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return a batch of the size that the network is for."""
    size = NETS[net_name][1]
    images = torch.randn(batch, 3, size, size, device=device)
    return images.contiguous(memory_format=memory_format)


def make_step(net_name: str, batch: int, device: str) -> Step:
    """Return a step of a network on random images, in NCHW and float32."""
    images = draw_images(net_name, batch, device)
    return make_step_of(NETS[net_name][0]().to(device), images)


def make_step_of(net: nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> Step:
    """Return a step of SGD with momentum, under autocast to a type if one is given.

    The rate is 0, so that the weights stay and every step computes the same.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    target = torch.randint(10, (len(images),), device=images.device)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(net(images), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Step(net, optimizer, run)

"""The sizes and rounds of the benchmark of the targets."""

from dataclasses import dataclass, field

import torch
from sampled import Pace

Shape = tuple[int, int, int, int]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that is measured.

    Attributes:
        rounds: of a layer; networks, which take seconds each, are timed in half as many.
        pace: how long a call is repeated, and which rounds count.
        shapes: of the layers' inputs on the CPU, (N, C, H, W); `small_shapes` are N2's.
        widths: of the rows of a layer norm; `elements` are in all of its rows.
        net: the CIFAR network that is trained, with `batch` images.
        small_net: the same for N7's other step, N8 and C9, and compiled, since that takes minutes.
        compiler: the backend of torch.compile.
        large_net: the one for ImageNet, with `large_batch` images.
        sentences, words: of the batch of the Transformer; `layers`, `width` and `vocabulary` are
            its size.
        images: in the random set of the data path.
        steps: of an epoch by a Trainer.
        gpu_shapes: of the layers' inputs on a GPU; `gpu_large_batch` is ResNet-50's there.
    """

    rounds: int = 10
    pace: Pace = field(default_factory=Pace)
    shapes: tuple[Shape, ...] = (
        (128, 16, 32, 32),
        (128, 64, 8, 8),
        (32, 64, 56, 56),
        (32, 256, 14, 14),
    )
    small_shapes: tuple[Shape, ...] = ((2, 16, 4, 4), (32, 16, 8, 8))
    widths: tuple[int, ...] = (128, 512, 1024, 4096)
    elements: int = 2**20
    net: str = "resnet56"
    batch: int = 128
    small_net: str = "resnet20"
    compiler: str = "inductor"
    large_net: str = "resnet50"
    large_batch: int = 8
    sentences: int = 32
    words: int = 32
    layers: int = 6
    width: int = 512
    vocabulary: int = 32_000
    images: int = 6_400
    steps: int = 4
    gpu_shapes: tuple[Shape, ...] = (
        (256, 64, 112, 112),
        (256, 256, 56, 56),
        (256, 64, 56, 56),
        (256, 512, 28, 28),
        (256, 2048, 7, 7),
        (128, 16, 32, 32),
    )
    gpu_large_batch: int = 256

    @property
    def layer_pace(self) -> Pace:
        """Return the rounds of a layer."""
        return self.pace._replace(rounds=self.rounds)

    @property
    def net_pace(self) -> Pace:
        """Return the rounds of a network's step."""
        return self.pace._replace(rounds=max(self.pace.least, self.rounds // 2))


QUICK = Plan(
    rounds=3,
    pace=Pace(block=0, share=0, least=3),
    shapes=((4, 8, 6, 6),),
    small_shapes=((2, 4, 2, 2),),
    widths=(8,),
    elements=64,
    net="resnet8",
    batch=4,
    small_net="resnet8",
    compiler="eager",
    large_net="resnet8",
    large_batch=2,
    sentences=2,
    words=4,
    layers=1,
    width=16,
    vocabulary=50,
    images=32,
    steps=1,
    gpu_shapes=((4, 8, 6, 6),),
    gpu_large_batch=2,
)

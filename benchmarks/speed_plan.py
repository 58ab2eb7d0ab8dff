"""The sizes and rounds of the benchmark of the targets."""

from dataclasses import dataclass

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that is measured.

    Attributes:
        rounds: of a layer; networks, which take seconds each, are timed in a quarter as many.
        shapes: of the layers' inputs on the CPU, (N, C, H, W).
        net: the CIFAR network that is trained in C6, C7 and H6, with `batch` images.
        compiled_net: that of C8, smaller, since compiling takes minutes.
        compiler: the backend of torch.compile.
        large_net: the one for ImageNet, with `large_batch` images.
        sentences, words: of the batch of the Transformer; `layers`, `width` and `vocabulary` are
            its size.
        images: in the random set of the data path.
        gpu_shapes: of the layers' inputs on a GPU; `gpu_large_batch` is ResNet-50's there.
    """

    rounds: int = 20
    shapes: tuple[Shape, ...] = (
        (128, 16, 32, 32),
        (128, 64, 8, 8),
        (32, 64, 56, 56),
        (32, 256, 14, 14),
    )
    net: str = "resnet56"
    batch: int = 128
    compiled_net: str = "resnet20"
    compiler: str = "inductor"
    large_net: str = "resnet50"
    large_batch: int = 8
    sentences: int = 32
    words: int = 32
    layers: int = 6
    width: int = 512
    vocabulary: int = 32_000
    images: int = 12_800
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
    def net_rounds(self) -> int:
        """Return the rounds of a network's step."""
        return max(2, self.rounds // 4)


QUICK = Plan(
    rounds=2,
    shapes=((4, 8, 6, 6),),
    net="resnet8",
    batch=4,
    compiled_net="resnet8",
    compiler="eager",
    large_net="resnet8",
    large_batch=2,
    sentences=2,
    words=4,
    layers=1,
    width=16,
    vocabulary=50,
    images=32,
    gpu_shapes=((4, 8, 6, 6),),
    gpu_large_batch=2,
)

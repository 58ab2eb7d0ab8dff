"""Data for the experiments: images in memory or decoded by workers, and sentence pairs."""

from typing import TYPE_CHECKING

from nmlightning.datamodules.cifar10 import CIFAR10 as CIFAR10
from nmlightning.datamodules.digits import Digits as Digits
from nmlightning.datamodules.imagenet import ImageNet as ImageNet
from nmlightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from nmlightning.translation.datamodules import WMT14 as WMT14
    from nmlightning.translation.datamodules import NumberNames as NumberNames
    from nmlightning.translation.datamodules import ParallelText as ParallelText

__getattr__, __dir__, __all__ = lazy_exports(__name__)

"""Data for the experiments: images in memory or decoded by workers, and sentence pairs."""

from nmlightning.datamodules.cifar10 import CIFAR10 as CIFAR10
from nmlightning.datamodules.digits import Digits as Digits
from nmlightning.datamodules.imagenet import ImageNet as ImageNet
from nmlightning.datamodules.number_names import NumberNames as NumberNames
from nmlightning.datamodules.parallel_text import ParallelText as ParallelText
from nmlightning.datamodules.wmt14 import WMT14 as WMT14

"""Data for the experiments: small sets held in memory, and ImageNet decoded by workers."""

from nmlightning.datamodules.cifar10 import CIFAR10 as CIFAR10
from nmlightning.datamodules.digits import Digits as Digits
from nmlightning.datamodules.imagenet import ImageNet as ImageNet

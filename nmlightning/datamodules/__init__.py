"""Data for the experiments: small sets held in memory, augmented on the training device."""

from nmlightning.datamodules.cifar10 import CIFAR10 as CIFAR10
from nmlightning.datamodules.digits import Digits as Digits

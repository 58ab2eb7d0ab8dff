"""Networks in plain torch with plain norms; `swap_norms` or `NormSwap` exchanges the norms."""

from nmlightning.models.resnet import CifarResNet as CifarResNet
from nmlightning.models.resnet50 import ResNet50 as ResNet50
from nmlightning.models.translated_relu import TReLU as TReLU
from nmlightning.models.vgg import VGG as VGG

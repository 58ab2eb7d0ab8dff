"""Networks in plain torch with plain norms; `swap_norms` or `NormSwap` exchanges the norms."""

from typing import TYPE_CHECKING

from nmlightning.lazy_exports import lazy_exports
from nmlightning.models.activation import TReLU as TReLU
from nmlightning.models.resnet import CifarResNet as CifarResNet
from nmlightning.models.resnet import ResNet18 as ResNet18
from nmlightning.models.resnet import ResNet50 as ResNet50
from nmlightning.models.vgg import VGG as VGG

if TYPE_CHECKING:
    from nmlightning.translation.decoding import beam_search as beam_search
    from nmlightning.translation.decoding import greedy_search as greedy_search
    from nmlightning.translation.lstm import AttentionLSTM as AttentionLSTM
    from nmlightning.translation.transformer import Transformer as Transformer

__getattr__, __dir__, __all__ = lazy_exports(__name__)

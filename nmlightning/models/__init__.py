"""Networks in plain torch with plain norms; `swap_norms` or `NormSwap` exchanges the norms."""

from nmlightning.models.beam_search import beam_search as beam_search
from nmlightning.models.greedy_search import greedy_search as greedy_search
from nmlightning.models.imagenet_resnet import ResNet18 as ResNet18
from nmlightning.models.imagenet_resnet import ResNet50 as ResNet50
from nmlightning.models.lstm import AttentionLSTM as AttentionLSTM
from nmlightning.models.resnet import CifarResNet as CifarResNet
from nmlightning.models.transformer import Transformer as Transformer
from nmlightning.models.translated_relu import TReLU as TReLU
from nmlightning.models.vgg import VGG as VGG

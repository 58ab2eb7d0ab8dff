"""Norms of activations and of weights, after *Norm matters* (arXiv 1803.01814).

Names are imported when they are first used, so that `import nmlightning` alone loads no torch.
"""

import sys
from typing import TYPE_CHECKING

from nmlightning.lazy_exports import RenamedModules, lazy_exports

if TYPE_CHECKING:
    from nmlightning.callbacks import Int8Swap as Int8Swap
    from nmlightning.callbacks import NormSwap as NormSwap
    from nmlightning.callbacks import WeightNormSwap as WeightNormSwap
    from nmlightning.callbacks import WeightNormTracker as WeightNormTracker
    from nmlightning.datamodules import CIFAR10 as CIFAR10
    from nmlightning.datamodules import WMT14 as WMT14
    from nmlightning.datamodules import Digits as Digits
    from nmlightning.datamodules import ImageNet as ImageNet
    from nmlightning.datamodules import NumberNames as NumberNames
    from nmlightning.datamodules import ParallelText as ParallelText
    from nmlightning.errors import InputError as InputError
    from nmlightning.export.export import ExportReport as ExportReport
    from nmlightning.export.export import export_network as export_network
    from nmlightning.export.fold import FoldReport as FoldReport
    from nmlightning.export.fold import fold_norms as fold_norms
    from nmlightning.int8 import Int8Conv1d as Int8Conv1d
    from nmlightning.int8 import Int8Conv2d as Int8Conv2d
    from nmlightning.int8 import Int8Conv3d as Int8Conv3d
    from nmlightning.int8 import Int8Linear as Int8Linear
    from nmlightning.int8 import quantize_norm as quantize_norm
    from nmlightning.kernels import norm_backend as norm_backend
    from nmlightning.models import VGG as VGG
    from nmlightning.models import AttentionLSTM as AttentionLSTM
    from nmlightning.models import CifarResNet as CifarResNet
    from nmlightning.models import ResNet18 as ResNet18
    from nmlightning.models import ResNet50 as ResNet50
    from nmlightning.models import Transformer as Transformer
    from nmlightning.models import TReLU as TReLU
    from nmlightning.models import beam_search as beam_search
    from nmlightning.models import greedy_search as greedy_search
    from nmlightning.norms import DynamicErf as DynamicErf
    from nmlightning.norms import DynamicTanh as DynamicTanh
    from nmlightning.norms import HalfL2BatchNorm1d as HalfL2BatchNorm1d
    from nmlightning.norms import HalfL2BatchNorm2d as HalfL2BatchNorm2d
    from nmlightning.norms import HalfL2BatchNorm3d as HalfL2BatchNorm3d
    from nmlightning.norms import L1BatchNorm1d as L1BatchNorm1d
    from nmlightning.norms import L1BatchNorm2d as L1BatchNorm2d
    from nmlightning.norms import L1BatchNorm3d as L1BatchNorm3d
    from nmlightning.norms import L1LayerNorm as L1LayerNorm
    from nmlightning.norms import L1RMSNorm as L1RMSNorm
    from nmlightning.norms import LInfBatchNorm1d as LInfBatchNorm1d
    from nmlightning.norms import LInfBatchNorm2d as LInfBatchNorm2d
    from nmlightning.norms import LInfBatchNorm3d as LInfBatchNorm3d
    from nmlightning.norms import LpBatchNorm1d as LpBatchNorm1d
    from nmlightning.norms import LpBatchNorm2d as LpBatchNorm2d
    from nmlightning.norms import LpBatchNorm3d as LpBatchNorm3d
    from nmlightning.norms import LpLayerNorm as LpLayerNorm
    from nmlightning.norms import LpRMSNorm as LpRMSNorm
    from nmlightning.norms import MeanOnlyBatchNorm1d as MeanOnlyBatchNorm1d
    from nmlightning.norms import MeanOnlyBatchNorm2d as MeanOnlyBatchNorm2d
    from nmlightning.norms import MeanOnlyBatchNorm3d as MeanOnlyBatchNorm3d
    from nmlightning.norms import QuantizationNoise as QuantizationNoise
    from nmlightning.norms import RangeBatchNorm1d as RangeBatchNorm1d
    from nmlightning.norms import RangeBatchNorm2d as RangeBatchNorm2d
    from nmlightning.norms import RangeBatchNorm3d as RangeBatchNorm3d
    from nmlightning.norms import RMSDynamicErf as RMSDynamicErf
    from nmlightning.norms import RMSDynamicTanh as RMSDynamicTanh
    from nmlightning.norms import ScaledLayerNorm as ScaledLayerNorm
    from nmlightning.norms import ScaledRMSNorm as ScaledRMSNorm
    from nmlightning.norms import TopKBatchNorm1d as TopKBatchNorm1d
    from nmlightning.norms import TopKBatchNorm2d as TopKBatchNorm2d
    from nmlightning.norms import TopKBatchNorm3d as TopKBatchNorm3d
    from nmlightning.norms import gaussian_constant as gaussian_constant
    from nmlightning.optim import CautiousDecay as CautiousDecay
    from nmlightning.optim import CorrectedDecay as CorrectedDecay
    from nmlightning.optim import DecayEquivalentLR as DecayEquivalentLR
    from nmlightning.optim import DecaySchedule as DecaySchedule
    from nmlightning.optim import Hyperball as Hyperball
    from nmlightning.optim import LRCorrection as LRCorrection
    from nmlightning.optim import NormSchedule as NormSchedule
    from nmlightning.optim import RadialProjection as RadialProjection
    from nmlightning.optim import SpectralCap as SpectralCap
    from nmlightning.optim import UnitNorm as UnitNorm
    from nmlightning.optim.norm_guard import guard_norms as guard_norms
    from nmlightning.optim.param_groups import parameter_groups as parameter_groups
    from nmlightning.optim.scope import exempt_from_decay as exempt_from_decay
    from nmlightning.parametrizations import apply_weight_norm as apply_weight_norm
    from nmlightning.parametrizations import remove_weight_norm as remove_weight_norm
    from nmlightning.probe.directions import probe_int8 as probe_int8
    from nmlightning.probe.inference import probe_inference as probe_inference
    from nmlightning.probe.probe import probe_norms as probe_norms
    from nmlightning.surgery.checkpoints import load_from_checkpoint as load_from_checkpoint
    from nmlightning.surgery.checkpoints import swap_like as swap_like
    from nmlightning.surgery.int8 import remove_int8 as remove_int8
    from nmlightning.surgery.int8 import swap_int8 as swap_int8
    from nmlightning.surgery.swap import SwapReport as SwapReport
    from nmlightning.surgery.swap import swap_norms as swap_norms
    from nmlightning.tasks import ImageClassifier as ImageClassifier
    from nmlightning.tasks import InverseSquareRootLR as InverseSquareRootLR
    from nmlightning.tasks import LineOptions as LineOptions
    from nmlightning.tasks import Translator as Translator
    from nmlightning.tasks import translate_lines as translate_lines
    from nmlightning.tracking import NormTracker as NormTracker
    from nmlightning.tracking import track_norms as track_norms
    from nmlightning.weights.channel_norms import ChannelLayout as ChannelLayout
    from nmlightning.weights.channel_norms import channel_norms as channel_norms
    from nmlightning.weights.history import NormHistory as NormHistory

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_exports(__name__)
sys.meta_path.insert(0, RenamedModules())

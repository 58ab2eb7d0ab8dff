"""Norms of activations and of weights, after *Norm matters* (arXiv 1803.01814).

Names are imported when they are first used, so that `import nmlightning` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmlightning.callbacks import NormSwap as NormSwap
    from nmlightning.callbacks import WeightNormSwap as WeightNormSwap
    from nmlightning.callbacks import WeightNormTracker as WeightNormTracker
    from nmlightning.checkpoints import load_from_checkpoint as load_from_checkpoint
    from nmlightning.datamodules import CIFAR10 as CIFAR10
    from nmlightning.datamodules import WMT14 as WMT14
    from nmlightning.datamodules import Digits as Digits
    from nmlightning.datamodules import ImageNet as ImageNet
    from nmlightning.datamodules import NumberNames as NumberNames
    from nmlightning.datamodules import ParallelText as ParallelText
    from nmlightning.errors import InputError as InputError
    from nmlightning.export.folding import FoldReport as FoldReport
    from nmlightning.export.folding import fold_norms as fold_norms
    from nmlightning.export.network import ExportReport as ExportReport
    from nmlightning.export.network import export_network as export_network
    from nmlightning.models import TReLU as TReLU
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
    from nmlightning.norms import TopKBatchNorm1d as TopKBatchNorm1d
    from nmlightning.norms import TopKBatchNorm2d as TopKBatchNorm2d
    from nmlightning.norms import TopKBatchNorm3d as TopKBatchNorm3d
    from nmlightning.norms import gaussian_constant as gaussian_constant
    from nmlightning.norms.kernels import norm_backend as norm_backend
    from nmlightning.probe import probe_norms as probe_norms
    from nmlightning.surgery import swap_norms as swap_norms
    from nmlightning.swap_report import SwapReport as SwapReport
    from nmlightning.tasks import ImageClassifier as ImageClassifier
    from nmlightning.tasks import InverseSquareRootLR as InverseSquareRootLR
    from nmlightning.tasks import Translator as Translator
    from nmlightning.weights.channel_norms import ChannelLayout as ChannelLayout
    from nmlightning.weights.channel_norms import channel_norms as channel_norms
    from nmlightning.weights.history import NormHistory as NormHistory
    from nmlightning.weights.parameter_groups import parameter_groups as parameter_groups
    from nmlightning.weights.steering import DecayEquivalentLR as DecayEquivalentLR
    from nmlightning.weights.steering import Hyperball as Hyperball
    from nmlightning.weights.steering import LRCorrection as LRCorrection
    from nmlightning.weights.steering import NormSchedule as NormSchedule
    from nmlightning.weights.steering import RadialProjection as RadialProjection
    from nmlightning.weights.weight_norm import apply_weight_norm as apply_weight_norm
    from nmlightning.weights.weight_norm import remove_weight_norm as remove_weight_norm

__version__ = "0.1.0"

_STATISTICS = ("HalfL2", "L1", "LInf", "Lp", "MeanOnly", "Range", "TopK")
_BATCH_NORMS = [f"{statistic}BatchNorm{n}d" for statistic in _STATISTICS for n in (1, 2, 3)]
_HOMES = {
    "callbacks": ["NormSwap", "WeightNormSwap", "WeightNormTracker"],
    "checkpoints": ["load_from_checkpoint"],
    "datamodules": ["CIFAR10", "WMT14", "Digits", "ImageNet", "NumberNames", "ParallelText"],
    "errors": ["InputError"],
    "export.folding": ["FoldReport", "fold_norms"],
    "export.network": ["ExportReport", "export_network"],
    "models": ["TReLU"],
    "norms": [
        *_BATCH_NORMS,
        "L1LayerNorm",
        "L1RMSNorm",
        "LpLayerNorm",
        "LpRMSNorm",
        "QuantizationNoise",
        "gaussian_constant",
    ],
    "norms.kernels": ["norm_backend"],
    "probe": ["probe_norms"],
    "surgery": ["swap_norms"],
    "swap_report": ["SwapReport"],
    "tasks": ["ImageClassifier", "InverseSquareRootLR", "Translator"],
    "weights.channel_norms": ["ChannelLayout", "channel_norms"],
    "weights.history": ["NormHistory"],
    "weights.parameter_groups": ["parameter_groups"],
    "weights.steering": [
        "DecayEquivalentLR",
        "Hyperball",
        "LRCorrection",
        "NormSchedule",
        "RadialProjection",
    ],
    "weights.weight_norm": ["apply_weight_norm", "remove_weight_norm"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

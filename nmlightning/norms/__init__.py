"""Norms of activations: the layers, and the constants that make them estimate σ."""

from nmlightning.functional.constants import gaussian_constant as gaussian_constant
from nmlightning.norms import fast_path as fast_path  # hooks into torch's encoders
from nmlightning.norms.batch_norm import L1BatchNorm as L1BatchNorm
from nmlightning.norms.batch_norm import L1BatchNorm1d as L1BatchNorm1d
from nmlightning.norms.batch_norm import L1BatchNorm2d as L1BatchNorm2d
from nmlightning.norms.batch_norm import L1BatchNorm3d as L1BatchNorm3d
from nmlightning.norms.batch_norm import LInfBatchNorm as LInfBatchNorm
from nmlightning.norms.batch_norm import LInfBatchNorm1d as LInfBatchNorm1d
from nmlightning.norms.batch_norm import LInfBatchNorm2d as LInfBatchNorm2d
from nmlightning.norms.batch_norm import LInfBatchNorm3d as LInfBatchNorm3d
from nmlightning.norms.batch_norm import LpBatchNorm as LpBatchNorm
from nmlightning.norms.batch_norm import LpBatchNorm1d as LpBatchNorm1d
from nmlightning.norms.batch_norm import LpBatchNorm2d as LpBatchNorm2d
from nmlightning.norms.batch_norm import LpBatchNorm3d as LpBatchNorm3d
from nmlightning.norms.batch_norm import RangeBatchNorm as RangeBatchNorm
from nmlightning.norms.batch_norm import RangeBatchNorm1d as RangeBatchNorm1d
from nmlightning.norms.batch_norm import RangeBatchNorm2d as RangeBatchNorm2d
from nmlightning.norms.batch_norm import RangeBatchNorm3d as RangeBatchNorm3d
from nmlightning.norms.batch_norm import TopKBatchNorm as TopKBatchNorm
from nmlightning.norms.batch_norm import TopKBatchNorm1d as TopKBatchNorm1d
from nmlightning.norms.batch_norm import TopKBatchNorm2d as TopKBatchNorm2d
from nmlightning.norms.batch_norm import TopKBatchNorm3d as TopKBatchNorm3d
from nmlightning.norms.layer_norm import L1LayerNorm as L1LayerNorm
from nmlightning.norms.layer_norm import L1RMSNorm as L1RMSNorm
from nmlightning.norms.layer_norm import LpLayerNorm as LpLayerNorm
from nmlightning.norms.layer_norm import LpRMSNorm as LpRMSNorm
from nmlightning.norms.low_precision import HalfL2BatchNorm as HalfL2BatchNorm
from nmlightning.norms.low_precision import HalfL2BatchNorm1d as HalfL2BatchNorm1d
from nmlightning.norms.low_precision import HalfL2BatchNorm2d as HalfL2BatchNorm2d
from nmlightning.norms.low_precision import HalfL2BatchNorm3d as HalfL2BatchNorm3d
from nmlightning.norms.low_precision import QuantizationNoise as QuantizationNoise
from nmlightning.norms.mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm1d as MeanOnlyBatchNorm1d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm2d as MeanOnlyBatchNorm2d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm3d as MeanOnlyBatchNorm3d

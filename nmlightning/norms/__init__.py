"""Norms of activations: the layers, and the constants that make them estimate σ."""

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
from nmlightning.norms.batch_norm import TopKBatchNorm as TopKBatchNorm
from nmlightning.norms.batch_norm import TopKBatchNorm1d as TopKBatchNorm1d
from nmlightning.norms.batch_norm import TopKBatchNorm2d as TopKBatchNorm2d
from nmlightning.norms.batch_norm import TopKBatchNorm3d as TopKBatchNorm3d
from nmlightning.norms.gaussian import gaussian_constant as gaussian_constant
from nmlightning.norms.layer_norm import L1LayerNorm as L1LayerNorm
from nmlightning.norms.layer_norm import LpLayerNorm as LpLayerNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm1d as MeanOnlyBatchNorm1d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm2d as MeanOnlyBatchNorm2d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm3d as MeanOnlyBatchNorm3d

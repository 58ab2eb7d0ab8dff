"""Training and evaluation in 8 bits or fewer: quantisers, layers, and what computes them."""

from nmlightning.int8.layers import Int8Conv1d as Int8Conv1d
from nmlightning.int8.layers import Int8Conv2d as Int8Conv2d
from nmlightning.int8.layers import Int8Conv3d as Int8Conv3d
from nmlightning.int8.layers import Int8Layer as Int8Layer
from nmlightning.int8.layers import Int8Linear as Int8Linear
from nmlightning.int8.layers import describe_backends as describe_backends
from nmlightning.int8.norms import quantize_norm as quantize_norm
from nmlightning.int8.norms import restore_norm as restore_norm

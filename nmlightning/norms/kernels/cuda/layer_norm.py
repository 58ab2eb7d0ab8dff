"""L1 layer and RMS norms by Triton kernels: one launch forward, two backward."""

import torch
from torch import Tensor

from nmlightning.norms.kernels.cuda.launch import on_device_of
from nmlightning.norms.kernels.cuda.partition import (
    PROGRAMS_PER_PROCESSOR,
    VECTOR_BYTES,
    at_least,
    processors_of,
)
from nmlightning.norms.kernels.cuda.rows import (
    fold_parts,
    normalise_rows,
    write_row_gradients,
)

TILE = 2048  # elements; a longer row is a tile, of which registers spill above 8,192 features
ELEMENTS_PER_THREAD = 8
FOLD = {"HEIGHT": 64, "WIDTH": 32, "num_warps": 4, "enable_fp_fusion": True}


class TritonLayerNorm:
    """L1 layer norm, or RMS norm if not centred, of contiguous rows of `features` elements.

    What is kept of each row is μ, 1/σ and c · ŝ/σ: (3, rows) float32.
    """

    def __init__(self, centred: bool) -> None:
        self.centred = centred

    def forward(
        self,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        bias: Tensor | None,
        constant: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Return y like x, and the values of the rows that backward needs."""
        rows = x.numel() // features
        y = torch.empty_like(x)
        values = x.new_empty(3, rows, dtype=torch.float32)
        if rows:
            tile = _tile(features, x.element_size())
            with on_device_of(x):
                normalise_rows[-(-rows // tile["HEIGHT"]),](
                    x, weight, bias, y, values, constant, eps, rows, features // tile["VECTOR"],
                    **tile, CENTRED=self.centred,
                )  # fmt: skip
        return y, values

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        features: int,
        weight: Tensor | None,
        values: Tensor,
        learned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients by x and, if `learned`, by weight and bias, float32, else empty."""
        rows = x.numel() // features
        out = torch.empty_like(x)
        found = values.new_zeros(2, features if learned else 0)
        if rows:
            tile = _tile(features, x.element_size())
            programs, tiles = _share_rows(-(-rows // tile["HEIGHT"]), processors_of(x.device))
            parts = values.new_empty(2, programs, features) if learned else None
            with on_device_of(x):
                write_row_gradients[programs,](
                    grad.contiguous(), x, weight, values, out, parts, rows,
                    features // tile["VECTOR"], tiles, **tile, CENTRED=self.centred,
                )  # fmt: skip
                if learned:
                    grid = (-(-features // FOLD["WIDTH"]), 2)
                    fold_parts[grid](parts, found, features, programs, **FOLD)
        return out, found[0], found[1]


def _tile(features: int, item: int) -> dict[str, int]:
    width = at_least(features)
    height = max(1, TILE // width)
    return {
        "VECTOR": min(VECTOR_BYTES // item, features & -features),
        "HEIGHT": height,
        "WIDTH": width,
        "num_warps": max(1, min(32, height * width // (32 * ELEMENTS_PER_THREAD))),
        "enable_fp_fusion": True,
    }


def _share_rows(tiles: int, processors: int) -> tuple[int, int]:
    """Return how many programs share the tiles, and how many tiles each has at most."""
    each = -(-tiles // (PROGRAMS_PER_PROCESSOR * processors))
    return -(-tiles // each), each

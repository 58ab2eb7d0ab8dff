"""Colours for values from 0 to 1."""

import numpy as np
from numpy.typing import NDArray

# Points of matplotlib's viridis, from small to large; between them colours are linear.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
        *((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
    ],
    dtype=np.float64,
)
_NOT_FINITE = (220, 38, 38)


def paint(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (…, 3) colours, red, green and blue, of (…,) values from 0 to 1; NaN is red."""
    places = np.linspace(0.0, 1.0, len(_VIRIDIS))
    parts = [np.interp(np.nan_to_num(shares), places, part) for part in _VIRIDIS.T]
    colours = np.stack(parts, axis=-1).round()
    return np.where(np.isnan(shares)[..., None], _NOT_FINITE, colours).astype(np.uint8)

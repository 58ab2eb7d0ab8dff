"""A picture of the norms of all channels of a layer over the epochs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

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


_WIDTH, _HEIGHT = 480, 256  # of the map itself, in pixels; about, where cells are whole pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 36, 96, 44  # margins
_LOGARITHMIC_FROM = 10.0  # largest norm over smallest


def draw_heatmap(norms: NDArray[np.float32], title: str) -> NDArray[np.uint8]:
    """Return a picture with epochs to the right, channels downwards, and a scale of colours.

    Colours are logarithmic where the norms span more than a decade; what is zero then has the
    colour of the smallest positive norm. What is not finite is red.

    Args:
        norms: (T, C) ‖w_i‖ of C channels at T moments, at least one of each.
        title: what stands above the picture.

    Returns:
        (H, W, 3), red, green and blue.
    """
    epochs, channels = norms.shape
    scale = _Scale.of(norms)
    area = _resize(paint(scale.shares(norms).T))
    width, height = area.size
    bar = Image.fromarray(paint(np.linspace(1.0, 0.0, height)[:, None].repeat(14, axis=1)))

    picture = Image.new("RGB", (_LEFT + width + _RIGHT, _TOP + height + _BOTTOM), "white")
    picture.paste(area, (_LEFT, _TOP))
    picture.paste(bar, (_LEFT + width + 12, _TOP))
    right, bottom, below = _LEFT + width, _TOP + height, _TOP + height + 6
    write = ImageDraw.Draw(picture).text
    font = ImageFont.load_default(13)
    for x, y, anchor, text in (
        (_LEFT, 10, "la", f"{title}: norm of each channel, {scale.name}"),
        (_LEFT - 6, _TOP, "ra", "0"),
        (_LEFT - 6, _TOP + height // 2, "rm", "channel"),
        (_LEFT - 6, bottom, "rd", f"{channels - 1}"),
        (_LEFT, below, "la", "0"),
        (_LEFT + width // 2, below, "ma", "epoch"),
        (right, below, "ra", f"{epochs - 1}"),
        (right + 32, _TOP, "la", f"{scale.high:.3g}"),
        (right + 32, bottom, "ld", f"{scale.low:.3g}"),
    ):
        write((x, y), text, fill="black", font=font, anchor=anchor)
    return np.asarray(picture)


@dataclass(frozen=True)
class _Scale:
    """Which norm has the first and which the last colour."""

    low: float
    high: float
    name: str

    @classmethod
    def of(cls, norms: NDArray[np.float32]) -> "_Scale":
        finite = norms[np.isfinite(norms)].astype(np.float64)
        positive = finite[finite > 0]
        if not len(positive):
            return cls(0.0, 0.0, "linear")
        if positive.max() > _LOGARITHMIC_FROM * finite.min():
            return cls(float(positive.min()), float(positive.max()), "logarithmic")
        return cls(float(finite.min()), float(finite.max()), "linear")

    def shares(self, norms: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return where on the scale norms are, from 0 to 1; NaN where they are not finite."""
        values = np.where(np.isfinite(norms), norms, np.nan).astype(np.float64)
        ends = np.array([self.low, self.high])
        if self.name == "logarithmic":
            values, ends = np.log(np.maximum(values, self.low)), np.log(ends)
        width = ends[1] - ends[0]
        return np.asarray((values - ends[0]) / width if width else np.zeros_like(values) * values)


def _resize(colours: NDArray[np.uint8]) -> Image.Image:
    """Return the cells as squares of whole pixels, or as averages where there are too many."""
    rows, columns = colours.shape[:2]
    size = (columns * max(1, _WIDTH // columns), rows * max(1, _HEIGHT // rows))
    sharp = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
    fits = (min(size[0], 2 * _WIDTH), min(size[1], 2 * _HEIGHT))
    return sharp if fits == size else sharp.resize(fits, Image.Resampling.BOX)

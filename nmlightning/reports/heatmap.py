"""A picture of the norms of all channels of a layer over the epochs."""

import numpy as np
from numpy.typing import NDArray

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
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    low, high, scale = _choose_scale(norms)
    shown = np.where(np.isfinite(norms), np.maximum(norms, low), np.nan)
    figure = Figure((6.4, 3.4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.13, 0.75, 0.76))
    image = axes.imshow(
        shown.T,
        cmap=colormaps["viridis"].with_extremes(bad="red"),
        norm=(LogNorm if scale == "logarithmic" else Normalize)(low, high),
        aspect="auto",
    )
    # Every tick costs half a millisecond, and there is a picture for every layer.
    last_epoch, last_channel = (length - 1 for length in norms.shape)
    axes.set(xlabel="epoch", xticks=[0, last_epoch], ylabel="channel", yticks=[0, last_channel])
    axes.set_title(f"{title}: norm of each channel, {scale}", fontsize=10, loc="left")
    bar = figure.colorbar(image, cax=figure.add_axes((0.87, 0.13, 0.025, 0.76)), format="%.3g")
    bar.set_ticks([low, high])
    bar.minorticks_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _choose_scale(norms: NDArray[np.float32]) -> tuple[float, float, str]:
    """Return which norm has the first and which the last colour, and what is between them."""
    finite = norms[np.isfinite(norms)]
    positive = finite[finite > 0]
    if not len(positive):
        return 0.0, 0.0, "linear"
    high = float(positive.max())
    if high > _LOGARITHMIC_FROM * finite.min():
        return float(positive.min()), high, "logarithmic"
    return float(finite.min()), high, "linear"

"""A picture of the norms of all channels of a layer over the epochs."""

import functools

import numpy as np
from numpy.typing import NDArray

_LOGARITHMIC_FROM = 10.0  # largest norm over smallest


def draw_heatmap(norms: NDArray[np.float32], title: str) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3): epochs to the right, channels downwards, and a scale of colours.

    Colours are logarithmic where the norms (T, C), of C channels at T moments, span more than a
    decade; what is zero then has the colour of the smallest positive norm. What is not finite is
    red.
    """
    from matplotlib.colors import LogNorm, Normalize

    low, high, scale = _choose_scale(norms)
    frame = _frame(*norms.shape)
    frame.image.set_data(np.where(np.isfinite(norms), np.maximum(norms, low), np.nan).T)
    if low == high:
        frame.image.set_norm(Normalize(low - 1, high + 1))  # the middle of the colours
    else:
        frame.image.set_norm((LogNorm if scale == "logarithmic" else Normalize)(low, high))
    return frame.draw(f"{title}: norm of each channel, {scale}", f"{low:.3g}", f"{high:.3g}")


class _Frame:
    """The parts that pictures of as many epochs and channels share, drawn once.

    To draw everything takes 40 ms, most of it for text, and there is a picture for every layer.
    """

    def __init__(self, epochs: int, channels: int) -> None:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._figure = figure = Figure((6.4, 3.4), dpi=100)
        self._canvas = FigureCanvasAgg(figure)
        colours = colormaps["viridis"].with_extremes(bad="red")
        bar = figure.add_axes((0.87, 0.13, 0.025, 0.76), xticks=[])
        bar.imshow(np.linspace(1, 0, 256)[:, None], colours, aspect="auto", extent=(0, 1, 0, 1))
        bar.yaxis.tick_right()
        bar.set_yticks([0, 1], ["", ""])
        axes = figure.add_axes((0.1, 0.13, 0.75, 0.76), xlabel="epoch", ylabel="channel")
        self.image = axes.imshow(np.zeros((channels, epochs)), colours, aspect="auto")
        axes.set(xticks=[0, epochs - 1], yticks=[0, channels - 1])
        self._canvas.draw()
        self._drawn = self._canvas.copy_from_bbox(figure.bbox)
        self._texts = [
            figure.text(0.1, 0.912, ""),
            figure.text(0.911, 0.13, "", va="center"),
            figure.text(0.911, 0.89, "", va="center"),
        ]
        self._changing = [self.image, *axes.spines.values(), *self._texts]

    def draw(self, *texts: str) -> NDArray[np.uint8]:
        """Return the picture (H, W, 3) of the image, a title and the ends of its scale."""
        self._canvas.restore_region(self._drawn)
        for artist, text in zip(self._texts, texts, strict=True):
            artist.set_text(text)
        for changing in self._changing:
            self._figure.draw_artist(changing)
        picture: NDArray[np.uint8] = np.array(self._canvas.buffer_rgba())[..., :3]
        return picture


_frame = functools.lru_cache(maxsize=8)(_Frame)


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

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray

from nmlightning.callbacks.norm_dashboard import draw_heatmap

FIRST, MIDDLE, LAST = (tuple(colormaps["viridis"](x, bytes=True))[:3] for x in (0.0, 0.5, 1.0))
RED = (255, 0, 0)


def colours_of(norms: NDArray[np.float32]) -> list[list[tuple[int, ...]]]:
    """Return the colour in the middle of each cell, for each channel those of the epochs."""
    picture = draw_heatmap(norms, "conv")
    height, width, _ = picture.shape
    epochs, channels = norms.shape
    rows = height * (0.11 + 0.76 * (np.arange(channels) + 0.5) / channels)
    columns = width * (0.1 + 0.75 * (np.arange(epochs) + 0.5) / epochs)
    cells = picture[rows.astype(int)][:, columns.astype(int)]
    return [[tuple(cell) for cell in row] for row in cells.tolist()]


def test_heatmap_has_channels_down_and_epochs_across() -> None:
    cells = colours_of(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, np.nan]], dtype=np.float32))
    assert cells[0][0] == FIRST
    assert cells[1][1] == LAST
    assert cells[2][1] == RED
    assert np.allclose(cells[2][0], MIDDLE, atol=3)


def test_heatmap_of_more_than_a_decade_is_logarithmic() -> None:
    cells = colours_of(np.array([[1.0, 10.0, 100.0, 0.0]], dtype=np.float32))
    assert np.allclose(cells[1][0], MIDDLE, atol=3)
    assert cells[3][0] == FIRST


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_heatmap_of_equal_norms_has_one_colour(value: float) -> None:
    cells = colours_of(np.full((2, 2), value, np.float32))
    assert len({colour for row in cells for colour in row}) == 1
    assert (cells[0][0] == RED) is not np.isfinite(value)


@pytest.mark.parametrize("shape", [(1, 1), (300, 4096), (5000, 3)])
def test_heatmap_size_is_that_of_any_picture(shape: tuple[int, int]) -> None:
    assert draw_heatmap(np.ones(shape, np.float32), "conv").shape == (340, 640, 3)

import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray

from nmlightning.callbacks.norm_dashboard import draw_heatmap

COLOURS = {x: tuple(colormaps["RdBu_r"]((x + 1) / 2, bytes=True))[:3] for x in (-1, 0, 1)}
GREY = (128, 128, 128)


def colours_of(norms: NDArray[np.float32]) -> list[list[tuple[int, ...]]]:
    """Return the colour in the middle of each cell, for each channel those of the epochs."""
    picture = draw_heatmap(norms)
    height, width, _ = picture.shape
    epochs, channels = norms.shape
    rows = height * (0.13 + 0.7 * (np.arange(channels) + 0.5) / channels)
    columns = width * (0.16 + 0.6 * (np.arange(epochs) + 0.5) / epochs)
    cells = picture[rows.astype(int)][:, columns.astype(int)]
    return [[tuple(cell) for cell in row] for row in cells.tolist()]


@pytest.mark.parametrize("start", [1.0, 1e-3, 1e20])
def test_heatmap_has_channels_down_and_epochs_across_in_multiples_of_the_start(
    start: float,
) -> None:
    norms = np.array([[1, 1, 1, np.nan], [8, 1 / 8, 0, np.inf]], dtype=np.float32) * start
    cells = colours_of(norms.astype(np.float32))
    assert [row[0] for row in cells] == [COLOURS[0]] * 3 + [GREY]
    assert [row[1] for row in cells] == [COLOURS[1], COLOURS[-1], COLOURS[-1], GREY]


def test_heatmap_has_the_same_colour_for_the_same_norm_in_all_runs_and_epochs() -> None:
    norms = np.array([[1.0, 3.0], [1.5, 2.5], [4.0, 1.0]], dtype=np.float32)
    early, late = colours_of(norms[:2]), colours_of(norms)
    assert [row[:2] for row in late] == early
    assert late[0][0] == late[1][2]


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_heatmap_of_equal_norms_has_one_colour(value: float) -> None:
    cells = colours_of(np.full((2, 2), value, np.float32))
    assert len({colour for row in cells for colour in row}) == 1
    assert (cells[0][0] == GREY) is not np.isfinite(value)


@pytest.mark.parametrize("shape", [(1, 1), (300, 4096), (5000, 3)])
def test_heatmap_size_is_that_of_any_picture(shape: tuple[int, int]) -> None:
    assert draw_heatmap(np.ones(shape, np.float32)).shape == (270, 350, 3)

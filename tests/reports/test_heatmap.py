import numpy as np
import pytest
from numpy.typing import NDArray

from nmlightning.reports.heatmap import draw_heatmap, paint

FIRST, LAST, RED = (68, 1, 84), (253, 231, 37), (220, 38, 38)


def colours_of(picture: NDArray[np.uint8], epochs: int, channels: int) -> NDArray[np.uint8]:
    """Return (C, T, 3), the colour in the middle of each cell, found by the known margins."""
    width, height = 480 // epochs, 256 // channels
    rows = 36 + height // 2 + height * np.arange(channels)
    columns = 64 + width // 2 + width * np.arange(epochs)
    return picture[rows][:, columns]


def test_cells() -> None:
    norms = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, np.nan]], dtype=np.float32)
    cells = colours_of(draw_heatmap(norms, "conv"), 2, 3)
    assert tuple(cells[0, 0]) == FIRST
    assert tuple(cells[1, 1]) == LAST
    assert tuple(cells[2, 1]) == RED
    assert tuple(cells[2, 0]) == tuple(paint(np.array(0.5)))


def test_more_than_a_decade_is_logarithmic() -> None:
    norms = np.array([[1.0, 10.0, 100.0, 0.0]], dtype=np.float32)
    cells = colours_of(draw_heatmap(norms, "conv"), 1, 4)
    assert tuple(cells[1, 0]) == tuple(paint(np.array(0.5)))
    assert tuple(cells[3, 0]) == FIRST


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_all_alike(value: float) -> None:
    cells = colours_of(draw_heatmap(np.full((2, 2), value, np.float32), "conv"), 2, 2)
    assert {tuple(cell) for cell in cells.reshape(-1, 3)} == {FIRST if value < 2 else RED}


@pytest.mark.parametrize("shape", [(1, 1), (300, 4096), (5000, 3)])
def test_size(shape: tuple[int, int]) -> None:
    height, width, _ = draw_heatmap(np.ones(shape, np.float32), "conv").shape
    assert 300 < height < 700
    assert 400 < width < 1200

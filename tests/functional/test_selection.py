"""Test the search for the largest deviations, block by block, and the sums of gradients."""

import pytest
import torch
from torch import Tensor

from nmlightning.functional.batch_norm import gradient_sums
from nmlightning.functional.selection import Blocks

SHAPES = [
    (4, 3),
    (2, 3, 1),
    (2, 5, 600),
    (3, 2, 1009),
    (2, 3, 7, 5),
    (3, 16, 32, 32),
    (2, 300, 14, 14),
    (2, 4, 3, 4, 16),
]


def layouts(x: Tensor) -> list[Tensor]:
    """Return x contiguous, with the channels last, and lying otherwise."""
    wide = torch.stack([x, x], -1)[..., 0]
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return [x, last, wide]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_neighbours_and_tell_their_largest(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[0] = 0.0
    by_channel = x.transpose(0, 1).flatten(1)
    for layout in layouts(x):
        blocks = Blocks.of(layout)
        cut = by_channel.unflatten(1, (-1, blocks.size))
        assert torch.equal(blocks.largest_sizes(), cut.abs().amax(2))
        assert not blocks.largest_sizes().signbit().any()
        chosen = torch.stack([torch.randperm(cut.shape[1])[:2] for _ in range(shape[1])])
        rows = torch.arange(shape[1]).unsqueeze(1)
        assert torch.equal(blocks.take(chosen), cut[rows, chosen].flatten(1))


@pytest.mark.parametrize(
    ("spatial", "size"),
    [(1, 1), (49, 49), (64, 64), (1024, 128), (3136, 112), (1009, 1), (262, 131)],
)
def test_sizes_of_blocks(spatial: int, size: int) -> None:
    assert Blocks.of(torch.zeros(2, 3, spatial)).size == size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_sums(shape: tuple[int, ...]) -> None:
    grad, x = torch.randn(2, *shape, dtype=torch.float64)
    mean = torch.randn(shape[1], dtype=torch.float64)
    dims = (0, *range(2, len(shape)))
    centred = x - mean.view(1, -1, *[1] * (len(shape) - 2))
    for g in layouts(grad):
        for values in layouts(x):
            total, product = gradient_sums(g, values, mean)
            torch.testing.assert_close(total, grad.sum(dims))
            torch.testing.assert_close(product, (grad * centred).sum(dims))


def test_gradient_sums_of_nothing_are_0() -> None:
    empty = torch.zeros(0, 3, 2, 2)
    assert [s.tolist() for s in gradient_sums(empty, empty, torch.ones(3))] == [[0.0] * 3] * 2

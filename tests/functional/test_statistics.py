"""Statistics, selection and sums of gradients against sorted lists and autograd, ties included."""

import pytest
import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.functional import statistics
from nmlightning.functional.batch_norm import gradient_sums
from nmlightning.functional.constants import Constant
from nmlightning.functional.reductions import Share
from nmlightning.functional.selection import Blocks, select_largest

# One to three spatial dimensions and none; the last is long rows, where few rows hold the largest.
SHAPES = [
    (12, 3),
    (4, 3, 5),
    (3, 2, 2, 4),
    (2, 2, 3, 2, 2),
    (2, 3, 40),
    (5, 1, 1, 7),
    (30, 2, 1, 1),
]
BLOCK_SHAPES = [
    (4, 3),
    (2, 3, 1),
    (2, 5, 600),
    (3, 2, 1009),
    (2, 3, 7, 5),
    (3, 16, 32, 32),
    (2, 300, 14, 14),
    (2, 4, 3, 4, 16),
]
ALONE = Share(0)  # selecting needs no count


def by_channel(x: Tensor) -> Tensor:
    """Return (N, C, *) as (C, n), in the order that positions count in."""
    return x.transpose(0, 1).flatten(1)


def integers(shape: tuple[int, ...]) -> Tensor:
    """Return values −2 … 2: nearly all of them are ties, of both signs."""
    return torch.randint(-2, 3, shape).double()


def layouts(x: Tensor) -> list[Tensor]:
    """Return x in its memory formats, and as every second element of something larger."""
    every_second = torch.stack([x, x + 1], -1)[..., 0]
    return [x, every_second, x.movedim(1, -1).contiguous().movedim(-1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_select_largest_takes_the_first_among_equals(shape: tuple[int, ...], k: int) -> None:
    for _ in range(5):
        d = integers(shape)
        flat = by_channel(d)
        # The definition: order by |d| descending, then by position ascending.
        order = [
            sorted(range(len(row)), key=lambda i, row=row: (-abs(row[i]), i))[:k]
            for row in flat.tolist()
        ]
        for layout in layouts(d):
            mean, selection = select_largest(layout, k, ALONE)
            assert selection.positions.sort(1).values.tolist() == [sorted(row) for row in order]
            chosen = flat.gather(1, selection.positions)
            torch.testing.assert_close(mean, chosen.abs().mean(1))
            assert torch.equal(selection.slopes, torch.where(chosen > 0, 1.0, -1.0).double() / k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_select_extremes_takes_the_first_of_each_chunk(shape: tuple[int, ...], chunks: int) -> None:
    d = integers(shape)
    flat = by_channel(d)
    parts = torch.arange(flat.shape[1]).tensor_split(chunks)
    expected = [
        [max(part.tolist(), key=lambda i, row=row, s=s: (s * row[i], -i)) for part in parts]
        for row in flat.tolist()
        for s in (1, -1)
    ]
    for layout in layouts(d):
        mean, selection = statistics.select_extremes(layout, chunks, Share(flat.shape[1]))
        assert selection.positions.view(-1, chunks).tolist() == expected
        ranges = flat.gather(1, selection.positions) * selection.slopes
        torch.testing.assert_close(mean, ranges.sum(1))
        assert selection.slopes.unique().tolist() == [-0.5 / chunks, 0.5 / chunks]


@pytest.mark.parametrize("convention", ["exact", "paper", "none", 0.5])
def test_range_mean_rejects_chunks_of_less_than_two(convention: Constant | float) -> None:
    with pytest.raises(InputError, match=r"The 16 chunks of n = 31 values a channel .* lower"):
        statistics.RangeMean(16).constant(31, convention)


def test_total_scale_in_half_needs_no_squares() -> None:
    scales = torch.tensor([0.0, 1e-5, 1e-3, 1.0, 3e4], dtype=torch.float16)
    for eps in (0.0, 1e-10, 1e-5):
        expected = (scales.double().square() + eps).sqrt()
        found = statistics.total_scale(scales, eps).double()
        # Half's spacing below 6e-5 is 6e-8: 0.3 % of √1e-10.
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=6e-8)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("p", [1.0, 1.5, 3.7, 60.0])
def test_power_mean_neither_overflows_nor_underflows(p: float, size: float) -> None:
    d = torch.randn(1000, 2)
    expected = statistics.power_mean(d.double(), p, (0,), Share(1000)) * size
    found = statistics.power_mean(d * size, p, (0,), Share(1000))
    # float32 powers near 60 cost about 60 roundings.
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_blocks_are_neighbours_with_their_largest(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[0] = 0.0
    for layout in layouts(x):
        blocks = Blocks.of(layout)
        cut = by_channel(x).unflatten(1, (-1, blocks.size))
        assert torch.equal(blocks.largest_sizes(), cut.abs().amax(2))
        assert not blocks.largest_sizes().signbit().any()
        chosen = torch.stack([torch.randperm(cut.shape[1])[:2] for _ in range(shape[1])])
        rows = torch.arange(shape[1]).unsqueeze(1)
        assert torch.equal(blocks.take(chosen), cut[rows, chosen].flatten(1))


@pytest.mark.parametrize(
    ("spatial", "size"),
    [(1, 1), (49, 49), (64, 64), (1024, 128), (3136, 112), (1009, 1), (262, 131)],
)
def test_blocks_have_good_sizes(spatial: int, size: int) -> None:
    assert Blocks.of(torch.zeros(2, 3, spatial)).size == size


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_gradient_sums_equal_the_definition(shape: tuple[int, ...]) -> None:
    grad, x = torch.randn(2, *shape, dtype=torch.float64)
    mean = torch.randn(shape[1], dtype=torch.float64)
    dims = (0, *range(2, len(shape)))
    centred = x - mean.view(1, -1, *[1] * (len(shape) - 2))
    for g in layouts(grad):
        for values in layouts(x):
            total, product = gradient_sums(g, values, mean)
            torch.testing.assert_close(total, grad.sum(dims))
            torch.testing.assert_close(product, (grad * centred).sum(dims))


def test_gradient_sums_of_nothing_are_zero() -> None:
    empty = torch.zeros(0, 3, 2, 2)
    assert [s.tolist() for s in gradient_sums(empty, empty, torch.ones(3))] == [[0.0] * 3] * 2

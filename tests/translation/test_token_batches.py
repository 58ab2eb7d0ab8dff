"""How sentence pairs are cut into batches: by their tokens, and always into as many."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nmlightning.translation.batches import cut_sorted, plan_batches

Lengths = NDArray[np.int64]


def make_lengths(pairs: int, seed: int = 0) -> tuple[Lengths, Lengths]:
    """Return lengths like those of sentences: skewed, and of one pair alike."""
    draw = np.random.default_rng(seed)
    source = draw.gamma(4, 5, pairs).astype(np.int64) + 1
    return source, (source * draw.normal(1, 0.15, pairs)).clip(1).astype(np.int64) + 1


def draw(plan: object, seed: int = 0) -> list[torch.Tensor]:
    return plan.draw(torch.Generator().manual_seed(seed))  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("tokens", [1, 60, 500, 10**9])
@pytest.mark.parametrize("pairs", [1, 2, 3000])
def test_every_pair_is_in_one_batch_within_the_bound(pairs: int, tokens: int) -> None:
    source, target = make_lengths(pairs)
    plan = plan_batches(source, target, tokens)
    for seed in range(3):
        batches = draw(plan, seed)
        assert len(batches) == len(plan), "as many in every epoch"
        assert torch.cat(batches).sort().values.tolist() == list(range(pairs))
        for rows in batches:
            longest = max(source[rows].max(), target[rows].max())
            assert len(rows) * longest <= tokens or len(rows) == 1


def test_no_batch_could_take_one_pair_more() -> None:
    draw_lengths = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.sort(draw_lengths.integers(1, 40, draw_lengths.integers(1, 50)))
        bounds = cut_sorted(lengths, 60)
        assert bounds[0] == 0
        assert bounds[-1] == len(lengths)
        for start, end in pairwise(bounds):
            assert (end - start) * lengths[end - 1] <= 60
            assert end == len(lengths) or (end + 1 - start) * lengths[end] > 60


def test_nothing_makes_no_batch() -> None:
    assert cut_sorted(np.array([], np.int64), 60) == [0]
    assert len(plan_batches(*make_lengths(0), 60)) == 0


def test_the_draw_follows_from_the_generator_alone() -> None:
    plan = plan_batches(*make_lengths(3000), 500)
    first, again, other = draw(plan, 0), draw(plan, 0), draw(plan, 1)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    batches = [{tuple(sorted(rows.tolist())) for rows in drawn} for drawn in (first, other)]
    assert len(batches[0] & batches[1]) < len(plan) / 4, "other pairs come together"
    longest = np.maximum(*make_lengths(3000))
    lengths = [longest[rows].max() for rows in first]
    assert lengths != sorted(lengths), "short and long batches are mixed"


@pytest.mark.parametrize(("tokens", "most"), [(500, 0.03), (4000, 0.05), (25000, 0.08)])
def test_little_is_padded(tokens: int, most: float) -> None:
    source, target = make_lengths(60_000)
    real = padded = 0
    for rows in draw(plan_batches(source, target, tokens)):
        for side in (source[rows], target[rows]):
            real += side.sum()
            padded += len(rows) * side.max()
    assert 1 - real / padded < most

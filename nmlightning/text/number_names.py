"""The names of numbers in German and in English: sentence pairs that need no files."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256

import torch

from nmlightning.text.sentence_pair import SentencePair
from nmlightning.text.text_packages import import_text_package

DIGITS = range(3, 7)  # of the numbers that are drawn; those below 100 are all trained on
SEED = 0


class NamedNumbers:
    """The German and English names of numbers, in their order: of 21 einundzwanzig, twenty-one.

    Args:
        numbers: each from 0 to 999,999.

    Raises:
        InputError: in iterating, without the package `num2words`.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    @property
    def digest(self) -> str:
        return sha256(repr(list(self.numbers)).encode()).hexdigest()[:32]

    def __iter__(self) -> Iterator[SentencePair]:
        return iter(self._pairs)

    @cached_property
    def _pairs(self) -> list[SentencePair]:
        name = import_text_package("num2words").num2words  # 0.2 ms a name
        return [SentencePair(name(n, lang="de"), name(n, lang="en")) for n in self.numbers]


def split_numbers(training: int, held_out: int) -> tuple[list[int], list[int], list[int]]:
    """Return numbers to train, to validate and to test with, none of them in two parts.

    Those from 0 to 99 are trained on, besides `training` others; validation and test have
    `held_out` each. Of the numbers of 3, 4, 5 and 6 digits there are equally many, or all that
    there are. Always the same.
    """
    parts: tuple[list[int], list[int], list[int]] = list(range(100)), [], []
    generator = torch.Generator().manual_seed(SEED)
    each = held_out // len(DIGITS)
    for digits in DIGITS:
        first = 10 ** (digits - 1)
        drawn = (first + torch.randperm(9 * first, generator=generator)).tolist()
        parts[2].extend(drawn[:each])
        parts[1].extend(drawn[each : 2 * each])
        rest = drawn[2 * each :]
        due = training // (DIGITS.stop - digits)  # an equal part of what is still to be found
        parts[0].extend(rest[:due])
        training -= len(rest[:due])
    return parts

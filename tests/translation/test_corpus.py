"""Encoded pairs: the limits, padding, and the cache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.translation import corpus
from nmlightning.translation.corpus import (
    EncodedPairs,
    Omissions,
    TrainingLimits,
    cached_pairs,
    cached_tokenizer,
    encode_pairs,
)
from nmlightning.translation.sources import SentencePair
from nmlightning.translation.tokenizer import BOS, EOS, PAD, SMALLEST, JointBPE

BYTES = JointBPE.train(["x"], vocab_size=SMALLEST)  # a byte is a token, and so is a first space

PAIRS = [
    SentencePair("abc", "one two three"),
    SentencePair("", "empty"),
    SentencePair("long " * 5, "x"),
    SentencePair("d", "\u2003"),
    SentencePair("ef", "four"),
]


class Listed(list[SentencePair]):
    """Pairs that know what they are."""

    digest = "listed"


def text(tokens: torch.Tensor) -> str:
    return BYTES.decode([tokens.tolist()])[0]


def test_encoded_batch_equals_its_definition() -> None:
    encoded = encode_pairs(PAIRS, BYTES)
    batch = encoded.batch(torch.tensor([4, 1, 0]))
    ef, four = (BYTES.encode([side])[0] for side in ("ef", "four"))
    assert batch.source.tolist()[0] == [*ef, EOS, PAD]
    assert batch.target.tolist()[0] == [BOS, *four, EOS, *[PAD] * 9]
    assert batch.source.tolist()[1] == [EOS, PAD, PAD, PAD, PAD]
    assert batch.words.tolist() == [2, 2, 4], "the words and the end"
    assert batch.source.dtype == batch.target.dtype == batch.words.dtype == torch.int64
    assert batch.references == ()
    widths = [(encoded.padded_lengths()[side][[4, 1, 0]]).max() for side in range(2)]
    assert [batch.source.shape[1], batch.target.shape[1]] == widths


def test_encoded_batch_shortens_sources_to_the_limit() -> None:
    encoded = encode_pairs(PAIRS, BYTES)
    rows = torch.tensor([2, 0])
    assert text(encoded.batch(rows).source[0]) == "long " * 5
    short = encoded.batch(rows, source_limit=6)
    assert [text(row) for row in short.source] == ["long ", "abc"]
    assert short.source.tolist()[0][-1] == EOS
    assert short.source.shape == (2, 7)


@pytest.mark.parametrize(
    ("limits", "sources", "omitted"),
    [
        (None, ["abc", "", "long " * 5, "d", "ef"], (0, 0)),
        (TrainingLimits(14, "drop"), ["abc", "ef"], (2, 1)),
        (TrainingLimits(14, "truncate"), ["abc", "long long lon", "ef"], (2, 1)),
        (TrainingLimits(3, "drop"), [], (2, 3)),
        (TrainingLimits(26, "drop"), ["abc", "long " * 5, "ef"], (2, 0)),
    ],
)
def test_encode_pairs_applies_the_limits(
    monkeypatch: pytest.MonkeyPatch,
    limits: TrainingLimits | None,
    sources: list[str],
    omitted: tuple[int, int],
) -> None:
    monkeypatch.setattr("nmlightning.translation.corpus.ENCODED_TOGETHER", 2)
    encoded = encode_pairs(PAIRS, BYTES, limits)
    rows = (encoded.batch(torch.tensor([row])) for row in range(encoded.length))
    assert [text(batch.source[0]) for batch in rows] == sources
    assert encoded.omitted == omitted


def test_encode_pairs_truncates_targets() -> None:
    encoded = encode_pairs(PAIRS[:1], BYTES, TrainingLimits(5, "truncate"))
    assert text(encoded.batch(torch.tensor([0])).target[0]) == "one "


def test_omissions_are_described() -> None:
    limits = TrainingLimits(9, "truncate")
    assert Omissions(0, 0).describe(limits) == ""
    assert Omissions(0, 3).describe(limits) == "3 of more than 9 tokens were shortened"
    told = Omissions(2, 3).describe(TrainingLimits(9, "drop"))
    assert told == "2 with an empty side were left out and 3 of more than 9 tokens were left out"


def test_encode_pairs_stores_16_or_32_bits() -> None:
    assert encode_pairs(PAIRS, BYTES).source.tokens.dtype == np.uint16

    class Large:
        vocab_size = 2**16 + 1

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[2**16] for _ in texts]

    encoded = encode_pairs(PAIRS, Large())  # type: ignore[arg-type]
    assert encoded.source.tokens.dtype == np.uint32
    assert encoded.batch(torch.tensor([0])).source.tolist() == [[2**16, EOS]]


def test_encoded_pairs_digest_depends_on_tokens_and_order() -> None:
    digests = {
        encode_pairs(pairs, BYTES).digest
        for pairs in (
            PAIRS,
            PAIRS[::-1],
            PAIRS[1:],
            [PAIRS[0]._replace(target="One two three"), *PAIRS[1:]],
        )
    }
    assert len(digests) == 4
    assert encode_pairs(PAIRS, BYTES).digest in digests


LIMITS = TrainingLimits(14, "drop")


def keep(folder: Path | None, **options: object) -> EncodedPairs:
    settings = {"pairs": Listed(PAIRS), "tokenizer": BYTES, "limits": LIMITS, **options}
    return cached_pairs(folder, **settings)  # type: ignore[arg-type]


def assert_same(one: EncodedPairs, other: EncodedPairs) -> None:
    assert one.digest == other.digest
    assert one.omitted == other.omitted
    for ours, theirs in zip((*one.source, one.words), (*other.source, other.words), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert other.is_intact()


def test_cached_pairs_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = keep(None)
    assert_same(encoded, keep(tmp_path / "new" / "folder"))
    monkeypatch.setattr(corpus, "encode_pairs", None)  # nothing is encoded again
    assert_same(encoded, keep(tmp_path / "new" / "folder", check=True))
    assert len(list(tmp_path.rglob("*.*"))) == 1, "nothing unfinished is left"


def test_cached_pairs_of_other_options_are_other_files(tmp_path: Path) -> None:
    other = Listed(PAIRS)
    other.digest = "other"
    for options in (
        {},
        {"limits": TrainingLimits(14, "truncate")},
        {"limits": TrainingLimits(15, "drop")},
        {"tokenizer": JointBPE.train(["x"], vocab_size=SMALLEST + 1)},
        {"pairs": other},
    ):
        keep(tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 5


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[:-1],
    "emptied": lambda content: b"",
    "no such file": lambda content: b"\xff" * 100,
    "changed": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "other metadata": lambda content: content.replace(b'\\"empty\\"', b'\\"emptx\\"'),
    "no JSON": lambda content: content.replace(b"{\\", b"[\\"),
    "no digest": lambda content: content.replace(b'"digest"', b'"digesx"'),
    "no words": lambda content: content.replace(b'"words"', b'"wordz"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_cached_pairs_replace_damaged_files(tmp_path: Path, damage: str) -> None:
    encoded = keep(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()  # the pairs still map the old file
    path.write_bytes(DAMAGES[damage](content))
    assert_same(encoded, keep(tmp_path, check=True))
    assert_same(encoded, keep(tmp_path))


def test_cached_tokenizer_replaces_a_damaged_file(tmp_path: Path) -> None:
    first = cached_tokenizer(tmp_path, Listed(PAIRS), 265)
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert cached_tokenizer(tmp_path, Listed(PAIRS), 265).digest == first.digest
    assert JointBPE.load(path).digest == first.digest
    cached_tokenizer(tmp_path, Listed(PAIRS), 266)
    assert len(list(tmp_path.iterdir())) == 2


def test_cached_pairs_refuse_an_empty_result() -> None:
    with pytest.raises(InputError, match=r"no sentence pair is left .* 2 have .* 3 more than 3"):
        keep(None, limits=TrainingLimits(3, "drop"))

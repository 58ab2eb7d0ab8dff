"""Text files as a data module: what it keeps, what it says of bad input, and real sentences."""

import gzip
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from made_sentences import make_pairs, make_text, write_pairs
from nmlightning import ParallelText
from nmlightning.errors import InputError
from nmlightning.translation import corpus
from nmlightning.translation.corpus import TranslationBatch
from nmlightning.translation.tokenizer import PAD, JointBPE


def prepare(data: ParallelText) -> ParallelText:
    data.prepare_data()
    data.setup("fit")
    return data


def count_padding(batches: list[TranslationBatch]) -> float:
    """Return PAD over all tokens of both sides."""
    sides = [side for batch in batches for side in (batch.source, batch.target)]
    return sum(int((side == PAD).sum()) for side in sides) / sum(side.numel() for side in sides)


def test_training_batches_hold_the_files(tmp_path: Path) -> None:
    data = prepare(make_text(tmp_path))
    assert data.tokenizer is not None
    assert data.vocab_size == data.tokenizer.vocab_size == 300
    read = {}
    for batch in data.train_dataloader():
        assert max(batch.source.numel(), batch.target.numel()) <= 200
        assert batch.references == ()
        sides = (data.tokenizer.decode(side.tolist()) for side in batch[:2])
        read |= dict(zip(*sides, strict=True))
        assert batch.words.tolist() == [
            len(read[source].split()) + 1 for source in data.tokenizer.decode(batch.source.tolist())
        ]
    assert sorted(read.items()) == sorted(make_pairs(90))


def test_the_tokenizer_and_the_pairs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(make_text(tmp_path))
    monkeypatch.setattr(corpus, "_train_tokenizer", None)
    monkeypatch.setattr(corpus, "encode_pairs", None)
    again = make_text(tmp_path)
    again.setup("fit")  # as on the other ranks, where prepare_data is not called
    for ours, theirs in zip(first.train_dataloader(), make_first(again), strict=True):
        assert all(torch.equal(*sides) for sides in zip(ours[:3], theirs[:3], strict=True))
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "data/translation").iterdir())
    assert kept == ["pairs", "tokenizer"]


def make_first(data: ParallelText) -> Any:
    torch.manual_seed(0)
    return data.train_dataloader()


def test_a_tokenizer_from_elsewhere_is_used_as_it_is(tmp_path: Path) -> None:
    bpe = JointBPE.train(["something else"], vocab_size=270)
    bpe.save(tmp_path / "bpe.json")
    data = prepare(make_text(tmp_path, tokenizer=str(tmp_path / "bpe.json"), max_length=190))
    assert data.tokenizer is not None
    assert data.tokenizer.digest == bpe.digest
    assert data.vocab_size == bpe.vocab_size < 300


@pytest.mark.parametrize("given", [False, True])
def test_test_and_prediction_read_the_test_files_or_validation(tmp_path: Path, given: bool) -> None:
    data = make_text(tmp_path)
    if given:
        files = write_pairs(tmp_path, "test", make_pairs(5, seed=2))
        data = ParallelText(
            list(data.train_files), ["no", "file"], files, vocab_size=300, root=str(tmp_path)
        )
    data.setup("test")
    assert data.train is None
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        references = [reference for batch in loader for reference in batch.references]
        expected = make_pairs(5, seed=2) if given else make_pairs(23, seed=1)
        assert sorted(references) == sorted(pair.target for pair in expected)


def test_what_is_left_out_of_training_is_counted_once(tmp_path: Path) -> None:
    data = make_text(tmp_path)
    pairs = make_pairs(90)
    pairs[3], pairs[5] = pairs[3]._replace(source=" "), pairs[5]._replace(target="ein " * 101)
    write_pairs(tmp_path, "train", pairs)
    write_pairs(tmp_path, "val", pairs)
    message = r"Of the training pairs 1 with an empty side were left out and 1 of more than 100"
    with pytest.warns(UserWarning, match=message) as warned:
        prepare(data)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert data.train is not None
    assert data.train.length == 88
    validated = [reference for batch in data.val_dataloader() for reference in batch.references]
    assert sorted(validated) == sorted(pair.target for pair in pairs)


FILES = {"train": ["a", "b"], "val": ["a", "b"]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": ["a"]}, r"train is two files, of sentences and of their translations, got \['a'\]"),
    ({"val": "ab"}, "val is two files, .* got 'ab'"),
    ({"too_long": "skip"}, "too_long is 'drop' or 'truncate', got 'skip'"),
    ({"tokens_a_batch": 257}, "tokens_a_batch 257 is too few for a sentence of max_length 256"),
    ({"tokens_a_batch": 0}, "tokens_a_batch must be a whole number"),
    ({"max_length": 0}, "max_length must be a whole number"),
    ({"vocab_size": 100}, "vocab_size must be a whole number of at least 260"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParallelText(**{**FILES, **options})


def _shorten(folder: Path) -> None:
    write_pairs(folder, "other", make_pairs(89))
    (folder / "other.en").rename(folder / "train.en")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train.en").unlink(), r"there is no file .*train.en"),
        (_shorten, r"train.de has 90 lines and .*train.en 89"),
        (
            lambda folder: (folder / "train.de").write_bytes(b"a\n\xe4\n"),
            "train.de, line 2: byte 1",
        ),
        (lambda folder: (folder / "bpe.json").write_text("{}"), "bpe.json is no tokenizer"),
    ],
)
def test_bad_files(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    data = make_text(tmp_path)
    damage(tmp_path)
    if (tmp_path / "bpe.json").exists():
        data.tokenizer_path = str(tmp_path / "bpe.json")
    with pytest.raises(InputError, match=message):
        data.prepare_data()


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'nmlightning\[text\]'"):
        make_text(tmp_path).prepare_data()


@pytest.mark.real_data("multi30k")
@pytest.mark.parametrize(("tokens", "batches", "most"), [(4096, 123, 0.06), (25000, 21, 0.095)])
def test_multi30k(
    data_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokens: int,
    batches: int,
    most: float,
) -> None:
    root = tmp_path_factory.getbasetemp() / "multi30k"  # both share what is kept
    data = prepare(
        ParallelText(
            [str(data_root / f"multi30k/train.{side}.gz") for side in ("de", "en")],
            [str(data_root / f"multi30k/val.{side}.gz") for side in ("de", "en")],
            vocab_size=8000,
            tokens_a_batch=tokens,
            root=str(root),
        )
    )
    loader: Any = data.train_dataloader()
    read = list(loader)
    assert len(read) == len(loader) == pytest.approx(batches, abs=2)
    assert sum(len(batch.source) for batch in read) == 29_000
    assert count_padding(read) < most
    assert sum(len(batch.source) for batch in data.val_dataloader()) == 1014
    assert data.tokenizer is not None
    with gzip.open(data_root / "multi30k/val.de.gz", "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")
    assert data.tokenizer.decode(data.tokenizer.encode(lines)) == [line.lstrip() for line in lines]


@pytest.mark.real_data("wmt14")
@pytest.mark.filterwarnings("ignore:Of the training pairs 1 of more than 256 tokens were left out")
def test_wmt14_slice(data_root: Path, tmp_path: Path) -> None:
    train = [str(data_root / f"wmt14/train-slice.{side}.gz") for side in ("de", "en")]
    val = [str(data_root / f"wmt14/newstest2013.{side}") for side in ("de", "en")]
    data = prepare(ParallelText(train, val, vocab_size=16_000, root=str(tmp_path)))
    read: list[TranslationBatch] = list(data.train_dataloader())
    assert sum(len(batch.source) for batch in read) == 61_605 - 1
    assert count_padding(read) < 0.095
    assert sum(len(batch.source) for batch in data.val_dataloader()) == 3000
    assert all(isinstance(side, Tensor) for side in read[0][:3])

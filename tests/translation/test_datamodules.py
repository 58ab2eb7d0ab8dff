"""The data modules of text: ParallelText, WMT14 from a folder like the one on the Hub, numbers."""

import gzip
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from made_sentences import assert_same, fit, make_pairs, make_text, write_pairs
from nmlightning import WMT14, NumberNames, ParallelText
from nmlightning.datamodules.training_batches import WHOLE_SET, Shard
from nmlightning.errors import InputError
from nmlightning.translation import corpus
from nmlightning.translation.batches import StreamedBatches
from nmlightning.translation.corpus import TranslationBatch
from nmlightning.translation.tokenizer import PAD, JointBPE
from trainers import SaveAt


def prepare(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def count_padding(batches: list[TranslationBatch]) -> float:
    """Return PAD over all tokens of both sides."""
    sides = [side for batch in batches for side in (batch.source, batch.target)]
    return sum(int((side == PAD).sum()) for side in sides) / sum(side.numel() for side in sides)


def test_text_caches_tokenizer_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(make_text(tmp_path))
    monkeypatch.setattr(corpus.JointBPE, "train", None)
    monkeypatch.setattr(corpus, "encode_pairs", None)
    again = make_text(tmp_path)
    again.setup("fit")  # as on the other ranks, where prepare_data is not called
    read = first.train_dataloader()
    torch.manual_seed(0)
    for ours, theirs in zip(read, again.train_dataloader(), strict=True):
        assert all(torch.equal(*sides) for sides in zip(ours[:3], theirs[:3], strict=True))
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "data/translation").iterdir())
    assert kept == ["pairs", "tokenizer"]


def test_parallel_text_loads_a_given_tokenizer(tmp_path: Path) -> None:
    bpe = JointBPE.train(["something else"], vocab_size=270)
    bpe.save(tmp_path / "bpe.json")
    data = prepare(make_text(tmp_path, tokenizer=str(tmp_path / "bpe.json"), max_length=190))
    assert data.tokenizer.digest == bpe.digest
    assert data.vocab_size == bpe.vocab_size < 300


def test_parallel_text_tests_with_test_files(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, "test", make_pairs(5, seed=2))
    train = list(make_text(tmp_path).train_files)
    data = ParallelText(train, ["no", "file"], files, vocab_size=300, root=str(tmp_path))
    data.setup("test")
    assert data.train is None
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        references = [reference for batch in loader for reference in batch.references]
        assert sorted(references) == sorted(pair.target for pair in make_pairs(5, seed=2))


def test_parallel_text_warns_once_of_omitted_pairs(tmp_path: Path) -> None:
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
    assert data.train.length == 88
    validated = [reference for batch in data.val_dataloader() for reference in batch.references]
    assert sorted(validated) == sorted(pair.target for pair in pairs)


FILES = {"train": ["a", "b"], "val": ["a", "b"]}

BAD_SETTINGS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (ParallelText, {"train": ["a"]}, r"train is two files, of sentences and .*, got \['a'"),
    (ParallelText, {"val": "ab"}, "val is two files, .* got 'ab'"),
    (ParallelText, {"too_long": "skip"}, "too_long is 'drop' or 'truncate', got 'skip'"),
    (ParallelText, {"tokens_a_batch": 257}, "tokens_a_batch 257 is too few .* of max_length 256"),
    (ParallelText, {"tokens_a_batch": 0}, "tokens_a_batch must be a whole number"),
    (ParallelText, {"max_length": 0}, "max_length must be a whole number"),
    (ParallelText, {"vocab_size": 100}, "vocab_size must be a whole number of at least 260"),
    (WMT14, {"pool": 0}, "pool must be a whole number"),
    (WMT14, {"streaming": "yes"}, "streaming is True or False"),
    (NumberNames, {"pairs": 0}, "pairs must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD_SETTINGS)
def test_text_data_refuse_bad_settings(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**{**(FILES if make is ParallelText else {}), **options})


def test_parallel_text_refuses_bad_files(tmp_path: Path) -> None:
    data = make_text(tmp_path)
    (tmp_path / "train.en").unlink()
    with pytest.raises(InputError, match=r"there is no file .*train.en"):
        data.prepare_data()
    data.tokenizer_path = str(tmp_path / "bpe.json")
    (tmp_path / "bpe.json").write_text("{}")
    with pytest.raises(InputError, match=r"bpe.json is not a tokenizer"):
        data.prepare_data()


@pytest.mark.real_data("multi30k")
@pytest.mark.parametrize(("tokens", "batches", "most"), [(4096, 123, 0.06), (25000, 21, 0.095)])
def test_parallel_text_reads_multi30k(
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
    with gzip.open(data_root / "multi30k/val.de.gz", "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")
    assert data.tokenizer.decode(data.tokenizer.encode(lines)) == [line.lstrip() for line in lines]


@pytest.mark.real_data("wmt14")
@pytest.mark.filterwarnings("ignore:Of the training pairs 1 of more than 256 tokens were left out")
def test_parallel_text_reads_a_slice_of_wmt14(data_root: Path, tmp_path: Path) -> None:
    train = [str(data_root / f"wmt14/train-slice.{side}.gz") for side in ("de", "en")]
    val = [str(data_root / f"wmt14/newstest2013.{side}") for side in ("de", "en")]
    data = prepare(ParallelText(train, val, vocab_size=16_000, root=str(tmp_path)))
    read: list[TranslationBatch] = list(data.train_dataloader())
    assert sum(len(batch.source) for batch in read) == 61_605 - 1
    assert count_padding(read) < 0.095
    assert sum(len(batch.source) for batch in data.val_dataloader()) == 3000
    assert all(isinstance(side, Tensor) for side in read[0][:3])


@pytest.mark.parametrize("when", ["on_train_batch_end", "on_train_epoch_end"])
def test_text_run_may_change_batches_between_epochs(tmp_path: Path, when: str) -> None:
    batches = fit(make_text(tmp_path), max_epochs=1)
    save = SaveAt(len(batches.seen), tmp_path / "end.ckpt", when)
    fit(make_text(tmp_path), callbacks=[save], max_epochs=1)
    resumed = fit(make_text(tmp_path, tokens_a_batch=400), ckpt_path=save.path, max_epochs=2)
    other = fit(make_text(tmp_path, tokens_a_batch=400), max_epochs=2)
    expected = [
        tokens
        for tokens, epoch in zip(other.seen.values(), other.epochs, strict=True)
        if epoch == 1
    ]
    torch.testing.assert_close([*resumed.seen.values()], expected)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within the first epoch of a run on made sentences."""
    folder = tmp_path_factory.mktemp("interrupted")
    fit(make_text(folder), callbacks=[SaveAt(3, folder / "mid.ckpt")], max_epochs=1)
    return folder / "mid.ckpt"


def _other_pairs(folder: Path) -> dict[str, Any]:
    pairs = make_pairs(90)
    pairs[40] = pairs[40]._replace(target="another")
    JointBPE.train((side for pair in make_pairs(90) for side in pair), 300).save(folder / "bpe")
    files = write_pairs(folder, "other", pairs)
    return {"tokenizer": str(folder / "bpe"), "files": files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"tokens_a_batch": 300}, "with 200 tokens a batch, and this run has 300"),
        (lambda _: {"vocab_size": 299}, "with [0-9a-f]+ as its tokenizer, and this run has"),
        (lambda _: {"train": 91, "vocab_size": 260}, "as its tokenizer"),
        (lambda _: {"too_long": "drop", "max_length": 8}, "with 90 sentence pairs, and this run"),
        (_other_pairs, "of other sentence pairs, so the rest"),
    ],
)
@pytest.mark.filterwarnings("ignore:Of the training pairs")
def test_text_run_refuses_another_order(
    interrupted: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    options = change(tmp_path)
    files = options.pop("files", None)
    data = make_text(tmp_path, **options)
    data.train_files = tuple(files) if files else data.train_files
    with pytest.raises(InputError, match=f"written within an epoch .*{message}"):
        fit(data, ckpt_path=interrupted)


datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings(
    # datasets 5.2 leaves the files of a stream that is not read to its end to the collector.
    "ignore:unclosed file:ResourceWarning"
)

CARD = """---
configs:
- config_name: de-en
  data_files:
  - {split: train, path: de-en/train-*}
  - {split: validation, path: de-en/validation-*}
  - {split: test, path: de-en/test-*}
---
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the layout of wmt/wmt14, in two training files."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("wmt14")
    (folder / "de-en").mkdir()
    (folder / "README.md").write_text(CARD)
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    parts = {"train-0": make_pairs(90)[:55], "train-1": make_pairs(90)[55:]}
    parts |= {"validation-0": make_pairs(23, seed=1), "test-0": make_pairs(11, seed=2)}
    for name, pairs in parts.items():
        rows = [{"translation": {"de": pair.source, "en": pair.target}} for pair in pairs]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(folder / "de-en" / f"{name}.parquet")
    return folder


@pytest.fixture
def make_wmt14(copy: Path, tmp_path: Path) -> Callable[..., WMT14]:
    def make_data(**options: Any) -> WMT14:
        settings = {"vocab_size": 300, "tokens_a_batch": 200, "max_length": 100, "pool": 40}
        return WMT14(dataset=str(copy), root=str(tmp_path / "data"), **settings | options)

    return make_data


@pytest.fixture(params=["files", "wmt14", "stream"])
def make_data(
    make_wmt14: Callable[..., WMT14], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[], Any]:
    """Make a data module of the same pairs."""
    if request.param == "files":
        return lambda: make_text(tmp_path)
    return lambda: make_wmt14(streaming=request.param == "stream")


def test_text_data_read_every_split(make_data: Callable[[], Any]) -> None:
    data = prepare(make_data())
    assert data.vocab_size == data.tokenizer.vocab_size == 300
    read: dict[str, str] = {}
    for batch in data.train_dataloader():
        assert max(batch.source.numel(), batch.target.numel()) <= 200
        assert batch.references == ()
        sides = [data.tokenizer.decode(side.tolist()) for side in batch[:2]]
        read |= dict(zip(*sides, strict=True))
        assert batch.words.tolist() == [len(target.split()) + 1 for target in sides[1]]
    assert sorted(read.items()) == sorted(make_pairs(90))
    seeds = (1, 2, 2) if isinstance(data, WMT14) else (1, 1, 1)
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    for loader, seed in zip(loaders, seeds, strict=True):
        references = [reference for batch in loader for reference in batch.references]
        assert sorted(references) == sorted(p.target for p in make_pairs(len(references), seed))


def test_stream_caches_a_tokenizer_alone(make_wmt14: Callable[..., WMT14], tmp_path: Path) -> None:
    prepare(make_wmt14(streaming=True))
    (kept,) = (tmp_path / "data/translation").iterdir()
    assert kept.name.startswith("tokenizer")


def stream(data: WMT14, shard: Shard = WHOLE_SET, epoch: int = 0) -> list[str]:
    """Return the batches of a rank, as text."""
    loader = data.train_dataloader()
    assert isinstance(loader, StreamedBatches)
    assert not hasattr(loader, "__len__"), "their number is not known"
    loader.shard, loader.seed = shard, 3
    loader.set_epoch(epoch)
    return [str(batch.source.tolist()) for batch in loader]


def test_wmt14_stream_is_shuffled_in_pools(make_wmt14: Callable[..., WMT14]) -> None:
    data = prepare(make_wmt14(streaming=True))
    first = stream(data)
    assert first == stream(data)
    assert first != stream(data, epoch=1)
    rows = []
    for batch in data.train_dataloader():
        texts = data.tokenizer.decode(batch.source.tolist())
        rows.append([int(text.split()[0]) for text in texts])
    pools = [{row // 40 for row in batch} for batch in rows]
    assert all(len(pool) == 1 for pool in pools), "no batch is of two pools"
    assert [*map(min, pools)] == sorted(map(min, pools)), "which come in their order"
    assert sorted(row for batch in rows for row in batch) == list(range(90))


@pytest.mark.parametrize("world_size", [2, 3])
def test_wmt14_stream_is_shared_by_ranks(make_wmt14: Callable[..., WMT14], world_size: int) -> None:
    data = prepare(make_wmt14(streaming=True))
    ranks = [stream(data, Shard(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "as many steps on every rank"
    read = [batch for batches in ranks for batch in batches]
    assert len(read) == len(set(read))
    assert set(read) < set(stream(data))
    with pytest.raises(InputError, match="no 40 sentence pairs of the stream make a batch for"):
        stream(data, Shard(0, 99))


def test_wmt14_stream_warns_once_of_omitted_pairs(make_wmt14: Callable[..., WMT14]) -> None:
    data = prepare(make_wmt14(streaming=True, max_length=8))
    with pytest.warns(UserWarning, match=r"Of 40 pairs of the stream \d+ of more than 8") as told:
        stream(data)
    assert len(told) == 1


@pytest.mark.parametrize("make_data", ["files", "stream"], indirect=True)
@pytest.mark.parametrize(
    "when",
    ["on_train_batch_end", "on_train_batch_start", "on_validation_end", "on_train_epoch_end"],
)
def test_run_on_text_resumes_within_and_between_epochs(
    make_data: Callable[[], Any], tmp_path: Path, when: str
) -> None:
    """With the very next batch, token by token."""
    whole = fit(make_data(), max_epochs=2)
    first = whole.epochs.index(1)
    ends = not when.startswith("on_train_batch")
    for after in (0,) if ends else (0, 1, first // 2, first - 1):
        save = SaveAt(first + after, tmp_path / f"{after}.ckpt", when)
        fit(make_data(), callbacks=[save], max_epochs=1 if ends else 2)
        resumed = fit(make_data(), seed=2, ckpt_path=save.path, max_epochs=2)
        rest = {step: tokens for step, tokens in whole.seen.items() if step >= save.step}
        assert_same(resumed.seen, rest)


def test_wmt14_stream_resumes_with_its_pool(
    make_wmt14: Callable[..., WMT14], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(make_wmt14(streaming=True), max_epochs=1)
    last = len(whole.seen) - 1
    fit(make_wmt14(streaming=True), callbacks=[SaveAt(last, tmp_path / "mid.ckpt")], max_epochs=1)
    encoded: list[int] = []
    read = StreamedBatches._batches

    def count(self: StreamedBatches, few: Any, epoch: int, number: int) -> Any:
        encoded.append(number)
        return read(self, few, epoch, number)

    monkeypatch.setattr(StreamedBatches, "_batches", count)
    fit(make_wmt14(streaming=True), ckpt_path=tmp_path / "mid.ckpt", max_epochs=1)
    assert encoded == [2], "the third of three"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 41}, "with 40 pairs a pool, and this run has 41"),
        ({"tokens_a_batch": 201}, "with 200 tokens a batch, and this run has 201"),
        ({"max_length": 99}, "with 100 tokens a sentence at most, and this run has 99"),
        ({"too_long": "truncate"}, "with drop as what becomes of longer ones, and this run has tr"),
        ({"vocab_size": 290}, "as its tokenizer"),
    ],
)
def test_wmt14_stream_refuses_another_order(
    make_wmt14: Callable[..., WMT14], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    fit(make_wmt14(streaming=True), callbacks=[SaveAt(3, tmp_path / "mid.ckpt")], max_epochs=1)
    with pytest.raises(InputError, match=message):
        fit(make_wmt14(streaming=True, **options), ckpt_path=tmp_path / "mid.ckpt")


@pytest.mark.parametrize("streaming", [False, True])
def test_wmt14_names_the_remedy_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'wmt/wmt14'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"wmt/wmt14 \(de-en, train\) is not in .*/wmt14 and cannot be loaded \(Couldn't reach"
    with pytest.raises(InputError, match=message) as raised:
        WMT14(root=str(tmp_path), streaming=streaming).prepare_data()
    assert "\n" not in str(raised.value)
    assert "name the folder of a copy as dataset" in str(raised.value)


def test_number_names_train_a_tokenizer_in_memory() -> None:
    data = NumberNames(pairs=200)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer.vocab_size == data.vocab_size <= 400
    names = [data.tokenizer.decode(batch.source.tolist()) for batch in data.train_dataloader()]
    assert sorted(name for batch in names for name in batch) == sorted(
        pair.source for pair in data.training_pairs()
    )
    validated = [reference for batch in data.val_dataloader() for reference in batch.references]
    assert len(validated) == len(set(validated)) == 500
    assert set(validated).isdisjoint(pair.target for pair in data.training_pairs())
    tested = {reference for batch in data.test_dataloader() for reference in batch.references}
    assert tested.isdisjoint(validated)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tokenizers", lambda folder: make_text(folder)),
        ("tokenizers", lambda _: NumberNames(pairs=1)),
        ("num2words", lambda _: NumberNames(pairs=1)),
        ("datasets", lambda folder: WMT14(root=str(folder))),
    ],
)
def test_text_data_name_the_missing_extra(
    package: str, make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package}: pip install datasets num2words sacrebleu tokenizers"
    with pytest.raises(InputError, match=message):
        prepare(make(tmp_path))

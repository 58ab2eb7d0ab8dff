"""WMT14 in a folder like the one on the Hub, from disk and streamed; nothing is fetched."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from made_sentences import SaveAt, assert_same, fit, make_pairs
from nmlightning import WMT14
from nmlightning.datamodules.training_batches import WHOLE_SET, Shard
from nmlightning.errors import InputError
from nmlightning.translation.batches import StreamedBatches
from nmlightning.translation.corpus import TrainingLimits

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
def make(copy: Path, tmp_path: Path) -> Callable[..., WMT14]:
    def make_data(**options: Any) -> WMT14:
        settings = {"vocab_size": 300, "tokens_a_batch": 200, "max_length": 100, "pool": 40}
        return WMT14(dataset=str(copy), root=str(tmp_path / "data"), **settings | options)

    return make_data


def prepare(data: WMT14) -> WMT14:
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("streaming", [False, True])
def test_every_split_is_read_from_german_to_english(
    make: Callable[..., WMT14], streaming: bool
) -> None:
    data = prepare(make(streaming=streaming))
    assert data.tokenizer is not None
    assert data.vocab_size == 300
    read: dict[str, str] = {}
    for batch in data.train_dataloader():
        assert max(batch.source.numel(), batch.target.numel()) <= 200
        sides = (data.tokenizer.decode(side.tolist()) for side in batch[:2])
        read |= dict(zip(*sides, strict=True))
    assert sorted(read.items()) == sorted(make_pairs(90))
    loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    for loader, seed in zip(loaders, (1, 2, 2), strict=True):
        references = [reference for batch in loader for reference in batch.references]
        assert sorted(references) == sorted(p.target for p in make_pairs(len(references), seed))


def test_streaming_writes_the_tokenizer_alone(make: Callable[..., WMT14], tmp_path: Path) -> None:
    prepare(make(streaming=True))
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


def test_a_stream_is_shuffled_in_pools(make: Callable[..., WMT14]) -> None:
    data = prepare(make(streaming=True))
    assert data.tokenizer is not None
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
def test_ranks_share_a_stream(make: Callable[..., WMT14], world_size: int) -> None:
    data = prepare(make(streaming=True))
    ranks = [stream(data, Shard(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "as many steps on every rank"
    read = [batch for batches in ranks for batch in batches]
    assert len(read) == len(set(read))
    assert set(read) < set(stream(data))
    with pytest.raises(
        InputError, match="no 40 sentence pairs of the stream make a batch for each"
    ):
        stream(data, Shard(0, 99))


def test_a_stream_counts_what_it_leaves_out_once(make: Callable[..., WMT14]) -> None:
    data = prepare(make(streaming=True, max_length=8))
    with pytest.warns(
        UserWarning, match=r"Of 40 pairs of the stream \d+ of more than 8 to"
    ) as told:
        stream(data)
    assert len(told) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "when",
    ["on_train_batch_end", "on_train_batch_start", "on_validation_end", "on_train_epoch_end"],
)
def test_the_rest_of_an_epoch_is_the_rest(
    make: Callable[..., WMT14], tmp_path: Path, streaming: bool, when: str
) -> None:
    whole = fit(make(streaming=streaming), max_epochs=2)
    first = whole.epochs.index(1)
    ends = not when.startswith("on_train_batch")
    for after in (0,) if ends else (0, 1, first // 2, first - 1):
        save = SaveAt(first + after, tmp_path / f"{after}.ckpt", when)
        fit(make(streaming=streaming), callbacks=[save], max_epochs=2)
        resumed = fit(make(streaming=streaming), seed=2, ckpt_path=save.path, max_epochs=2)
        rest = {step: tokens for step, tokens in whole.seen.items() if step >= save.step}
        assert_same(resumed.seen, rest)


def test_a_resumed_stream_begins_with_its_pool(
    make: Callable[..., WMT14], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(make(streaming=True), max_epochs=1)
    last = len(whole.seen) - 1
    fit(make(streaming=True), callbacks=[SaveAt(last, tmp_path / "mid.ckpt")], max_epochs=1)
    encoded: list[int] = []
    read = StreamedBatches._batches

    def count(self: StreamedBatches, few: Any, epoch: int, number: int) -> Any:
        encoded.append(number)
        return read(self, few, epoch, number)

    monkeypatch.setattr(StreamedBatches, "_batches", count)
    fit(make(streaming=True), ckpt_path=tmp_path / "mid.ckpt", max_epochs=1)
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
def test_a_stream_refuses_another_order(
    make: Callable[..., WMT14], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    fit(make(streaming=True), callbacks=[SaveAt(3, tmp_path / "mid.ckpt")], max_epochs=1)
    with pytest.raises(InputError, match=message):
        fit(make(streaming=True, **options), ckpt_path=tmp_path / "mid.ckpt")


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_network_one_line_says_what_to_do(
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


def test_a_folder_without_the_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none \(de-en, train\) is not in"):
        WMT14(root=str(tmp_path), dataset=str(tmp_path / "none")).prepare_data()


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets: pip install"):
        WMT14(root=str(tmp_path)).prepare_data()


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="pool must be a whole number"):
        WMT14(pool=0)
    with pytest.raises(InputError, match="streaming is True or False"):
        WMT14(streaming="yes")  # type: ignore[arg-type]
    assert WMT14().limits == TrainingLimits(256, "drop")

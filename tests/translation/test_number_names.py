"""Names of numbers: what they are called, and that nothing is validated that was trained on."""

import sys

import pytest

from nmlightning import NumberNames
from nmlightning.errors import InputError
from nmlightning.translation.sources import NamedNumbers, split_numbers


def test_names() -> None:
    pairs = [
        ("null", "zero"),
        ("einundzwanzig", "twenty-one"),
        ("einhundertsieben", "one hundred and seven"),
        ("zweitausenddreißig", "two thousand and thirty"),
        (
            "siebenhundertsechzehntausendfünfhundertneunundneunzig",
            "seven hundred and sixteen thousand, five hundred and ninety-nine",
        ),
    ]
    assert list(NamedNumbers([0, 21, 107, 2030, 716599])) == pairs


@pytest.mark.parametrize("training", [1, 7, 2000, 6000])
def test_the_parts_share_no_number(training: int) -> None:
    parts = split_numbers(training, 500)
    assert [len(part) for part in parts] == [100 + training, 500, 500]
    assert len({number for part in parts for number in part}) == training + 1100
    assert max(max(part) for part in parts) < 1_000_000
    assert parts == split_numbers(training, 500), "always the same"
    assert split_numbers(1, 500)[1:] == parts[1:], "whatever is trained on"
    for part in parts[1:]:
        lengths = [len(str(number)) for number in part]
        assert [lengths.count(digits) for digits in (3, 4, 5, 6)] == [125] * 4


def test_the_tokenizer_is_trained_where_nothing_is_written() -> None:
    data = NumberNames(pairs=200)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer is not None
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


@pytest.mark.parametrize("package", ["num2words", "tokenizers"])
def test_without_the_extra_it_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the package {package}: pip install"):
        NumberNames(pairs=1).setup("fit")


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="pairs must be a whole number of at least 1, got 0"):
        NumberNames(pairs=0)

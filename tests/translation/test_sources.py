"""ParallelFiles: line ends and bad files. NamedNumbers: the names, and disjoint parts."""

import gzip
from pathlib import Path

import pytest

from nmlightning.errors import InputError
from nmlightning.translation.sources import NamedNumbers, ParallelFiles, SentencePair, split_numbers


def write_files(folder: Path, de: bytes, en: bytes) -> ParallelFiles:
    (folder / "de").write_bytes(de)
    (folder / "en").write_bytes(en)
    return ParallelFiles(folder / "de", folder / "en")


@pytest.mark.parametrize("packed", [False, True])
def test_parallel_files_split_at_line_feeds_alone(tmp_path: Path, packed: bool) -> None:
    odd = "b\u2028c\x0bd\x0ce\x1cf\x85g\rh\u2029 i".encode()
    de, en = b"\xef\xbb\xbfa\r\n" + odd + b"\n\nz", b"A\nB\n \nZ\n"
    pairs = write_files(tmp_path, gzip.compress(de) if packed else de, en)
    assert list(pairs) == [("a", "A"), (odd.decode(), "B"), ("", " "), ("z", "Z")]
    assert list(pairs) == list(pairs), "they can be read again"
    assert [pair.is_empty() for pair in pairs] == [False, False, True, False]


def test_parallel_files_read_several_gzip_members(tmp_path: Path) -> None:
    pairs = write_files(tmp_path, gzip.compress(b"a\nb") + gzip.compress(b"c\n"), b"A\nB\n")
    assert list(pairs) == [SentencePair("a", "A"), SentencePair("bc", "B")]


def test_parallel_files_digest_differs_for_other_files(tmp_path: Path) -> None:
    first = write_files(tmp_path, b"a\n", b"A\n").digest
    assert write_files(tmp_path, b"a\n", b"A\n").digest == first
    assert write_files(tmp_path, b"b\n", b"A\n").digest != first
    assert ParallelFiles(tmp_path / "en", tmp_path / "de").digest != first


PACKED = gzip.compress(b"a line\n" * 1000)

BAD_FILES = {
    "shorter": (b"a\nb\n", b"A\nB\nC\n", r"de has 2 lines and .*en 3, so they do not belong"),
    "longer": (b"a\nb\nc", b"A\n", r"de has 3 lines and .*en 1, so"),
    "one empty": (b"", b"A\n", r"de has 0 lines and .*en 1"),
    "both empty": (b"", b"", r"de and .*en are empty: give other files"),
    "not UTF-8": (b"a\nb \xe4\nc\n", b"A\nB\nC\n", r"de, line 2: byte 3 is not UTF-8"),
    "UTF-16": ("a\n".encode("utf-16"), b"A\n", r"de, line 1: byte 1 is not UTF-8"),
    "cut off": (PACKED[:-9], b"A\n" * 1000, r"de cannot be read after line \d+ .*: copy it again"),
    "damaged": (PACKED[:20] + b"\0" + PACKED[21:], b"A\n" * 1000, r"de cannot be read after line"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_parallel_files_refuse_bad_files(tmp_path: Path, name: str) -> None:
    de, en, message = BAD_FILES[name]
    with pytest.raises(InputError, match=message) as raised:
        list(write_files(tmp_path, de, en))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["none", "."])
def test_parallel_files_refuse_absent_files(tmp_path: Path, missing: str) -> None:
    (tmp_path / "de").touch()
    with pytest.raises(InputError, match=r"there is no file .*: give one with a sentence in each"):
        ParallelFiles(tmp_path / "de", tmp_path / missing)


def test_named_numbers_have_their_names() -> None:
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


def test_named_numbers_of_so_many_and_one_thousand() -> None:
    """num2words spells 9,000 of them "…einstausend…"."""
    numbers = [1_000, 101_000, 901_101, 301_001, 111_001]
    german = [
        "eintausend",
        "einhunderteintausend",
        "neunhunderteintausendeinhunderteins",
        "dreihunderteintausendeins",
        "einhundertelftausendeins",
    ]
    assert [pair.source for pair in NamedNumbers(numbers)] == german


@pytest.mark.parametrize("training", [1, 7, 2000, 6000])
def test_split_numbers_has_disjoint_parts(training: int) -> None:
    parts = split_numbers(training, 500)
    assert [len(part) for part in parts] == [100 + training, 500, 500]
    assert len({number for part in parts for number in part}) == training + 1100
    assert max(max(part) for part in parts) < 1_000_000
    assert parts == split_numbers(training, 500), "always the same"
    assert split_numbers(1, 500)[1:] == parts[1:], "whatever is trained on"
    for part in parts[1:]:
        lengths = [len(str(number)) for number in part]
        assert [lengths.count(digits) for digits in (3, 4, 5, 6)] == [125] * 4

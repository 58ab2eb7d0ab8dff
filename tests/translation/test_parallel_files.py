"""Two files of lines: what ends a line, and what is said of files that cannot be right."""

import gzip
from pathlib import Path

import pytest

from nmlightning.errors import InputError
from nmlightning.translation.sources import ParallelFiles, SentencePair


def write(folder: Path, de: bytes, en: bytes) -> ParallelFiles:
    (folder / "de").write_bytes(de)
    (folder / "en").write_bytes(en)
    return ParallelFiles(folder / "de", folder / "en")


@pytest.mark.parametrize("packed", [False, True])
def test_lines_end_with_line_feeds_alone(tmp_path: Path, packed: bool) -> None:
    odd = "b\u2028c\x0bd\x0ce\x1cf\x85g\rh\u2029 i".encode()
    de, en = b"\xef\xbb\xbfa\r\n" + odd + b"\n\nz", b"A\nB\n \nZ\n"
    pairs = write(tmp_path, gzip.compress(de) if packed else de, en)
    assert list(pairs) == [("a", "A"), (odd.decode(), "B"), ("", " "), ("z", "Z")]
    assert list(pairs) == list(pairs), "they can be read again"
    assert [pair.is_empty() for pair in pairs] == [False, False, True, False]


def test_several_packed_parts_are_one_file(tmp_path: Path) -> None:
    pairs = write(tmp_path, gzip.compress(b"a\nb") + gzip.compress(b"c\n"), b"A\nB\n")
    assert list(pairs) == [SentencePair("a", "A"), SentencePair("bc", "B")]


def test_other_files_have_another_digest(tmp_path: Path) -> None:
    first = write(tmp_path, b"a\n", b"A\n").digest
    assert write(tmp_path, b"a\n", b"A\n").digest == first
    assert write(tmp_path, b"b\n", b"A\n").digest != first
    assert ParallelFiles(tmp_path / "en", tmp_path / "de").digest != first


PACKED = gzip.compress(b"a line\n" * 1000)
BAD = {
    "shorter": (b"a\nb\n", b"A\nB\nC\n", r"de has 2 lines and .*en 3, so they do not belong"),
    "longer": (b"a\nb\nc", b"A\n", r"de has 3 lines and .*en 1, so"),
    "one empty": (b"", b"A\n", r"de has 0 lines and .*en 1"),
    "both empty": (b"", b"", r"de and .*en are empty: give other files"),
    "not UTF-8": (b"a\nb \xe4\nc\n", b"A\nB\nC\n", r"de, line 2: byte 3 is not UTF-8"),
    "UTF-16": ("a\n".encode("utf-16"), b"A\n", r"de, line 1: byte 1 is not UTF-8"),
    "cut off": (PACKED[:-9], b"A\n" * 1000, r"de cannot be read after line \d+ .*: copy it again"),
    "damaged": (PACKED[:20] + b"\0" + PACKED[21:], b"A\n" * 1000, r"de cannot be read after line"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    de, en, message = BAD[name]
    with pytest.raises(InputError, match=message) as raised:
        list(write(tmp_path, de, en))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["none", "."])
def test_a_file_that_is_not_there(tmp_path: Path, missing: str) -> None:
    (tmp_path / "de").touch()
    with pytest.raises(InputError, match=r"there is no file .*: give one with a sentence in each"):
        ParallelFiles(tmp_path / "de", tmp_path / missing)

"""The documentation and the comments name no file that is gone."""

import re
import runpy
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "configs", "docs", "examples", "findings", "nmlightning", "tests")
# From the root, anything in a folder of the project; from the package or alone, a source.
FROM_ROOT = rf"(?:{'|'.join(FOLDERS)})/[\w/.-]*\w(?![*\w…{{])"
SOURCE = r"(?:[\w-]+/)*[\w-]+\.(?:py|cpp)\b"
NAMED_PATH = re.compile(rf"(?<![\w/.:-])(?:{FROM_ROOT}|{SOURCE})")
PATTERNS = ("*.md", "*.cfg", "*.toml", "Makefile", "configs/*", "docs/*.md", "tests/**/*.md")
CODE = ("nmlightning/**/*.py", "nmlightning/**/*.cpp", "nmlightning/**/*.h", "benchmarks/*.py")


def exists(name: str) -> bool:
    if "/" not in name:
        return any(path for folder in FOLDERS for path in (ROOT / folder).rglob(name))
    shipped = name.replace("nmlightning/configs", "configs")  # the place in the wheel, by setup.cfg
    return (ROOT / shipped).exists() or (ROOT / "nmlightning" / name).exists()


def test_texts_name_no_path_that_is_gone() -> None:
    gone = [
        f"{path.relative_to(ROOT)}: {name}"
        for pattern in (*PATTERNS, *CODE)
        for path in ROOT.glob(pattern)
        for name in NAMED_PATH.findall(re.sub(r"https?://\S+", "", path.read_text("utf-8")))
        if not exists(name)
    ]
    assert not gone, "\n".join(["", *gone])


def test_every_picture_can_be_taken_anew_and_is_small() -> None:
    ways = runpy.run_path(str(ROOT / "docs" / "take_pictures.py"))["TAKEN"].values()
    names = [name for way in ways for name in way.__doc__.split(":")[0].split(", ")]
    for file in (ROOT / "docs" / "pictures").iterdir():
        assert any(fnmatch(file.stem, name) for name in names), file.name
        assert file.stat().st_size < 200_000, file.name

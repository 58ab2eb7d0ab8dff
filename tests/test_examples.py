"""The examples are short, and print what they show, but for the numbers."""

import json
import re
from pathlib import Path

import pytest

from scripts import ROOT, run_python


def mask(text: str) -> list[str]:
    return [re.sub(r"[\d.]+(e[+-]\d+)?", "#", line.strip()) for line in text.strip().splitlines()]


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.*")), ids=lambda path: path.name)
def test_example_prints_what_it_shows(example: Path, tmp_path: Path) -> None:
    text = code = example.read_text("utf-8")
    shown = "".join(re.findall(r'^Output.*?\n\n(.*?)"""', text, re.DOTALL | re.MULTILINE))
    if example.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        shown = "".join("".join(x["text"]) for cell in cells for x in cell["outputs"])
    if "Wandb" in code:
        pytest.importorskip("wandb")
    assert len(code.splitlines()) < 60
    assert str(Path.home()) not in text
    (tmp_path / "code.py").write_text(code)
    done = run_python("code.py", cwd=tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    printed = iter(mask(done.stdout))
    missing = [line for line in mask(shown) if line not in printed]
    assert shown
    assert not missing, done.stdout

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from nmlightning.cli import main

MakeRun = Callable[..., Path]


@pytest.fixture
def runs(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two settings, one of them with two seeds, with norms and factors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for seed, accuracy in ((1, [0.2, 0.4]), (2, [0.3, 0.5])):
        make_run(
            f"runs/wd_on/version_{seed}",
            accuracy,
            config={"seed_everything": seed, "decay": 0.1},
            norms={"net.conv.weight": [[1, 2], [0.5, 1], [0.25, 0.5]]},
        )
    make_run(
        "runs/[red]<off>/version_0",
        [0.25, 0.35],
        config={"seed_everything": 1, "decay": 0},
        scalars={"correction_factor/net.conv/mean": [1.0, 2.0], "weight_norm/net.conv/min": [1.0]},
    )
    return tmp_path / "runs"


def test_tables(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs)]) == 0
    text = capsys.readouterr().out
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in text.splitlines() if line[0] in "│┃"]
    assert rows == [
        ["run", "seeds", "epochs", "what differs"],
        ["[red]<off>", "1", "2", "decay: 0"],
        ["wd_on", "1, 2", "2", "decay: 0.1"],
        ["run", "final", "best", "time"],
        ["[red]<off>", "35.00 %", "35.00 %", "30.0 s"],
        ["wd_on", "45.00 ± 7.07 %", "45.00 ± 7.07 %", "30.0 s"],
    ]
    assert "comparison.html" in text


def test_a_resumed_run_is_one(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"seed_everything": 1}
    make_run("runs/a/version_0", [0.1, 0.2], config)
    going_on = {**config, "ckpt_path": "runs/a/version_0/checkpoints/last.ckpt"}
    make_run("runs/a/version_1", [0.3, 0.4], going_on, first_epoch=1)
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"a +│ 1 +│ 3 ", text)
    assert "resumed     runs/a/version_1 goes on with runs/a/version_0" in text
    assert "<title>Comparison of 1 run</title>" in Path("comparison.html").read_text()


def test_seeds_that_repeat_are_not_called_seeds(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        make_run(f"runs/a/version_{number}", config={"seed_everything": 1, "lr": 1})
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert "1 (2 runs)" in text
    assert "deviation over runs" in text


def test_page(runs: Path) -> None:
    assert main(["compare", str(runs), "--report", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert "http" not in page.replace('name="viewport"', "")
    body = page[page.index("<body>") : page.index("</html>")]
    tree = ET.fromstring(body)
    charts = {chart.get("aria-label"): chart for chart in tree.iter("svg")}
    headings = [heading.text for heading in tree.iter("h2")]
    assert headings == ["Metric", "Norms of weights", "Correction factors"]
    assert list(charts) == ["val/top1, %", "net.conv"]
    names = [path.findtext("title") for path in charts["val/top1, %"].iter("path")]
    assert names[-2:] == ["[red]<off>, " + str(runs / "[red]<off>/version_0"), "wd_on, mean"]
    cells = [cell.text for cell in tree.iter("td")]
    assert {"45.00 ± 7.07 %", "decay: 0.1"} < set(cells)


def test_of_many_layers_a_dozen_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    layers = [f"layer{number}.weight" for number in range(57)]
    folder = make_run(norms={name: [[1], [2]] for name in layers})
    report = tmp_path / "page.html"
    assert main(["compare", str(folder), "--report", str(report)]) == 0
    drawn = re.findall(r'aria-label="(layer\d+)"', report.read_text())
    assert (drawn[0], drawn[-1], len(drawn)) == ("layer0", "layer56", 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: run; nm compare --help lists what there is."),
        (["nowhere"], "there is no folder 'nowhere' in"),
        (["runs", "--metrics", "x"], "unrecognized arguments: --metrics x"),
        (["runs", "--metric", "val/top2"], "has logged no 'val/top2'. Did you mean 'val/top1'?"),
        (["runs", "--report", "notes.html"], "--report: notes.html is no page of nm compare"),
        (["runs", "--report", "runs"], "--report: runs is a folder; name a file in it."),
        (["runs", "--report", "no/page.html"], "--report: no/page.html cannot be written: No such"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = runs.parent / "notes.html"
    notes.write_text("mine")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert notes.read_text() == "mine"


def test_its_own_page_is_replaced(runs: Path) -> None:
    assert main(["compare", str(runs)]) == 0
    assert main(["compare", str(runs)]) == 0


def test_it_imports_no_torch(runs: Path) -> None:
    code = (
        "import sys; from nmlightning.cli import main; assert main(['compare', 'runs']) == 0; "
        "assert {'torch', 'lightning', 'pytorch_lightning'}.isdisjoint(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=runs.parent, check=True, capture_output=True)

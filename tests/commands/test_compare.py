import base64
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from nmlightning.cli import main
from nmlightning.weights.history import NormHistory
from scripts import run_python

MakeRun = Callable[..., Path]
KEPT = '{"settings": {"a": 1}, "seed": 1, "cpu_minutes": 1}'


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def runs(make_run: MakeRun, tmp_path: Path) -> Path:
    """Two settings, one of them with two seeds, with norms and factors."""
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


def test_compare_prints_both_tables(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs)]) == 0
    text = capsys.readouterr().out
    rows = [re.split("  +", line.strip()) for line in text.splitlines() if "  " in line.strip()]
    assert rows[:-1] == [
        ["run", "seeds", "epochs", "what differs"],
        ["[red]<off>", "1", "2", "decay: 0"],
        ["wd_on", "1, 2", "2", "decay: 0.1"],
        ["run", "final", "best", "time"],
        ["[red]<off>", "35.00 %", "35.00 %", "30.0 s"],
        ["wd_on", "45.00 ± 7.07 %", "45.00 ± 7.07 %", "30.0 s"],
    ]


def test_compare_joins_a_resumed_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"seed_everything": 1}
    make_run("runs/a/version_0", [0.1, 0.2], config)
    resume = {**config, "ckpt_path": "runs/a/version_0/checkpoints/last.ckpt"}
    make_run("runs/a/version_1", [0.3, 0.4], resume, first_epoch=1)
    make_run("runs/a/version_2", [0.3], resume, first_epoch=1)
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"a +1 +3 ", text)
    assert re.findall(r"resumed +(.*);", text) == [
        "runs/a/version_1 resumes runs/a/version_0",
        "runs/a/version_2 resumes runs/a/version_0",
    ]
    assert "<title>Comparison of 1 run</title>" in Path("comparison.html").read_text()


def test_compare_leaves_out_what_it_cannot_read_with_a_line_each(
    runs: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run("runs/killed", [])
    Path("runs/only/version_0").mkdir(parents=True)
    Path("runs/only/version_0/config.yaml").write_text("seed_everything: 1")
    make_run("runs/early", [], scalars={"train/loss": [1.0]})
    (make_run("runs/odd") / "config.yaml").write_text("a: [2001-99-99")
    (events,) = make_run("runs/damaged").glob("events*")
    content = events.read_bytes()
    events.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"left out +(.+?)[.:] ?", text) == [
        *("runs/damaged/events", "runs/odd/config"),
        *("runs/early has logged nothing in validation yet",),
        *("runs/killed has logged nothing in validation yet",),
        *("runs/only/version_0 has logged nothing in validation yet",),
    ]
    assert "<title>Comparison of 3 runs</title>" in Path("comparison.html").read_text()
    for folder in ("runs/killed", "runs/only"):
        assert main(["compare", folder]) == 2
        assert " has no metrics yet" in capsys.readouterr().err
    assert main(["compare", "runs/damaged"]) == 2
    assert "is damaged, or not an event file" in capsys.readouterr().err


def test_compare_leaves_out_a_folder_that_may_not_be_read(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(read: Any, path: Any) -> Any:
        if Path(path).name == "version_0":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    for name in ("scandir", "listdir"):  # the tests may run as root, who reads everything
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert "runs/[red]<off>/version_0 cannot be read: Permission denied." in text


@pytest.mark.filterwarnings("error")
def test_compare_shows_what_is_infinite_and_says_what_is_cut_off(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, end in ((1, float("inf")), (2, float("-inf"))):
        folder = make_run(f"runs/a/version_{seed}", [0.5, end], {"seed_everything": seed, "lr": 1})
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar("x", 1, walltime=end)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/metrics.csv").write_text("step,val/top1\n1,0.75\n2,0.")
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"a +nan % \(2 of 2 runs\) .* 30.0 s", text)
    assert re.search(r"b +75.00 %", text)
    assert "left out    runs/b/metrics.csv is cut off within its last line, which" in text


def test_compare_writes_an_escape_for_what_is_no_text(make_run: MakeRun) -> None:
    shutil.move(make_run("x"), b"\xff-1")
    for seed, setting in enumerate(("\\ud800", "b")):
        Path(f"k-{seed}.csv").write_text("step,val/top1\n1,0.75\n")
        settings = f'{{"\\udc00": "{setting}"}}'
        content = f'{{"settings": {settings}, "seed": {seed}, "cpu_minutes": 1}}'
        Path(f"k-{seed}.json").write_text(content)
    words = ("-m", "nmlightning", "compare", ".")
    out = run_python(*words, cwd=Path(), PYTHONIOENCODING="utf-8:strict").stdout
    for text in (out, Path("comparison.html").read_text(encoding="utf-8")):
        assert "\\udcff-1" in text
        assert "\\udc00: \\ud800" in text


def test_compare_names_a_deviation_over_repeated_seeds_one_over_runs(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        make_run(f"runs/a/version_{number}", config={"seed_everything": 1, "lr": 1})
    assert main(["compare", "runs"]) == 0
    text = capsys.readouterr().out
    assert "1 (2 runs)" in text
    assert "deviation over runs" in text


def charts_of(file: str = "comparison.html") -> dict[str, dict[str, Any]]:
    """Return what each chart of a page holds: its layout, and its lines as `data`, by title."""
    charts, page = {}, Path(file).read_text(encoding="utf-8")
    read = json.JSONDecoder().raw_decode
    for start in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', page):
        data, end = read(page, start.end())
        layout, _ = read(page, page.index("{", end))
        charts[layout["title"]["text"]] = {**layout, "data": data}
    return charts


def values_of(line: dict[str, Any], axis: str) -> list[float]:
    content = line[axis]
    return np.frombuffer(base64.b64decode(content["bdata"]), content["dtype"]).tolist()


def test_page_holds_the_table_and_the_curves(runs: Path) -> None:
    assert main(["compare", str(runs), "--report", "page.html"]) == 0
    page = Path("page.html").read_text(encoding="utf-8")
    body = re.sub("(?s)<script.*?</script>", "", page[page.index("<body>") : -len("</html>\n")])
    tree = ET.fromstring(body)
    headings = [heading.text for heading in tree.iter("h2")]
    assert headings == ["Curves", "Norms of weights", "Correction factors"]
    cells = [cell.text for cell in tree.iter("td")]
    assert {"45.00 ± 7.07 %", "decay: 0.1"} < set(cells)
    charts = charts_of("page.html")
    assert list(charts) == ["val/top1, %", "net.conv"]
    lines = charts["val/top1, %"]["data"]
    assert [line["name"] for line in lines] == [
        *("wd_on, version_1", "wd_on, version_2", "[red]&lt;off&gt;", "wd_on, mean")
    ]
    assert [line["opacity"] for line in lines] == [0.4, 0.4, 1, 1]
    assert values_of(lines[3], "x") == [1, 2]
    assert values_of(lines[3], "y") == pytest.approx([25, 45])
    assert len({line["line"]["color"] for line in lines}) == 2
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page), "no network"
    assert page.count("* plotly.js v") == 1


def test_page_shows_norms_and_factors_on_a_logarithmic_axis(runs: Path) -> None:
    assert main(["compare", str(runs / "wd_on" / "version_1")]) == 0
    chart = charts_of()["net.conv"]
    assert (chart["yaxis"]["type"], chart["yaxis"]["title"]["text"]) == ("log", "norm, log scale")
    assert values_of(chart["data"][0], "y") == [1.5, 0.75, 0.375]
    assert main(["compare", str(runs / "[red]<off>")]) == 0
    chart = charts_of()["net.conv"]
    assert values_of(chart["data"][0], "y") == [1, 2]


def test_page_shows_recorded_quantities(make_run: MakeRun) -> None:
    make_run("run", norms={"net.conv.weight": [[1.0], [0.5]]})
    file = Path("run/weight_norms.safetensors")
    history = NormHistory.load(file)
    rotations, cosines = [[np.nan], [0.25]], [[np.nan], [-0.5]]
    quantities = {"rotation": rotations, "weight_gradient_cosine": cosines}
    NormHistory.from_arrays(
        history.norms, history.steps, history.epochs, quantities=quantities
    ).save(file)
    assert main(["compare", "run"]) == 0
    page = Path("comparison.html").read_text()
    titles = ["Norms of weights", "Rotation per step, radians", "Cosine of weight and gradient"]
    assert [title for title in re.findall("<h2>(.*?)</h2>", page) if title in titles] == titles
    chart = charts_of()["net.conv"]  # the last of that layer
    assert chart["yaxis"]["title"]["text"] == "weight gradient cosine"
    assert chart["yaxis"]["type"] == "linear"
    assert values_of(chart["data"][0], "x") == [10]
    assert values_of(chart["data"][0], "y") == [-0.5]


def test_page_has_training_beside_validation_over_epochs_from_1(make_run: MakeRun) -> None:
    for name in ("b", "a"):
        values = [math.nan] * 9 + [1.0] + [math.nan] * 9 + [2.0]
        logged = {f"{stage}/{x}": values for stage in ("train", "val") for x in ("loss", "top1")}
        steps = {"train/loss_step": [1.0] * 20, "epoch": [0.0] * 10 + [1.0] * 10}
        lone = {"val/bleu": values, "test/loss": values} if name == "b" else {}
        folder = make_run(name, [], scalars={})
        with SummaryWriter(str(folder)) as writer:
            for tag, points in {**logged, **lone, **steps}.items():
                for step, value in enumerate(points):
                    if not math.isnan(value):
                        writer.add_scalar(tag, value, step)
    assert main(["compare", "b", "a"]) == 0
    charts = charts_of()
    assert list(charts) == [
        *("val/top1, %", "train/top1, %", "val/bleu", "val/loss", "train/loss", "train/loss_step")
    ]
    axes = [chart["xaxis"] for chart in charts.values()]
    assert [axis["title"]["text"] for axis in axes] == ["epoch"] * 5 + ["step"]
    assert [axis.get("dtick") for axis in axes] == [1] * 5 + [None]
    assert values_of(charts["val/loss"]["data"][1], "x") == [1, 2]
    assert [len(chart["data"]) for chart in charts.values()] == [2, 2, 1, 2, 2, 2]


def test_page_links_to_each_run_from_where_it_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("runs/a b%/version_0", config={"seed_everything": 1})
    for end, text in (("csv", "step,val/top1\n1,0.75\n"), ("json", KEPT)):
        (tmp_path / f"runs/k-1.{end}").write_text(text)
    (tmp_path / "pages").mkdir()
    assert main(["compare", "runs", "--report", "pages/page.html"]) == 0
    links = re.findall(
        '<a href="(.*?)">(.*?)</a>', Path("pages/page.html").read_text().split("<body>")[1]
    )
    assert [name for _, name in links] == ["version_0", "config", "curves", "settings"]
    targets = [(tmp_path / "pages" / unquote(link)).resolve() for link, _ in links]
    assert targets[:2] == [folder, folder / "config.yaml"]
    assert all(target.exists() for target in targets)


PROBE = """
const errors = [];
console.error = (...words) => errors.push(words.join(" "));
onerror = message => errors.push(message);
onload = () => setTimeout(() => {
  const sizes = [innerWidth, document.documentElement.scrollWidth];
  const first = () => document.querySelector("tbody td").textContent;
  const button = [...document.querySelectorAll("th button")].find(
    each => each.textContent.includes("final"));
  const firsts = [1, 2].map(() => (button.click(), button.parentNode.ariaSort + " " + first()));
  parent.postMessage({
    errors, sizes, firsts,
    drawn: document.querySelectorAll(".main-svg .trace path.js-line").length,
    widths: [...document.querySelectorAll(".js-plotly-plot")].map(
      each => each.querySelector(".main-svg").clientWidth - each.parentNode.clientWidth),
    page: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector(".xtick text")).fill,
  }, "*");
}, 500);
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here")
@pytest.mark.parametrize(("scheme", "page", "ink"), [(1, 255, 28), (0, 21, 229)])
def test_page_works_in_a_browser(scheme: int, page: int, ink: int, runs: Path) -> None:
    assert main(["compare", str(runs)]) == 0
    page_text, probe = Path("comparison.html").read_text(), f"<script>{PROBE}</script><title>"
    text = page_text.replace("<title>", probe, 1)
    Path("probed.html").write_text(text)
    Path("frames.html").write_text(
        '<body><iframe src="probed.html" style="width:1280px;height:900px"></iframe>'
        '<iframe src="probed.html" style="width:420px;height:900px"></iframe><script>onmessage = '
        'e => document.body.append("REPORT" + JSON.stringify(e.data) + "END")</script></body>'
    )
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=9000"]
    address = Path("frames.html").resolve().as_uri()
    dom = subprocess.run([*command, address], check=True, capture_output=True, text=True).stdout
    reports = [json.loads(unescape(x)) for x in re.findall("REPORT({.*?})END", dom)]
    assert sorted(report["sizes"][0] for report in reports) == [420, 1280]
    for report in reports:
        assert report["errors"] == []
        assert report["sizes"][1] <= report["sizes"][0]
        assert report["firsts"] == ["ascending [red]<off>", "descending wd_on"]
        assert report["drawn"] == 4 + 1 + 1
        assert report["widths"] == [0] * 3
        assert (f"({page}," in report["page"], f"({ink}," in report["ink"]) == (True, True)


def test_page_draws_a_dozen_of_many_layers(make_run: MakeRun) -> None:
    layers = [f"layer{number}.weight" for number in range(57)]
    folder = make_run(norms={name: [[1], [2]] for name in layers})
    assert main(["compare", str(folder)]) == 0
    _, *drawn = charts_of()
    assert (drawn[0], drawn[-1], len(drawn)) == ("layer0", "layer56", 12)


def test_page_thins_a_long_curve_and_keeps_its_ends(make_run: MakeRun) -> None:
    folder = make_run(scalars={"correction_factor/a/mean": list(map(float, range(2500)))})
    assert main(["compare", str(folder)]) == 0
    steps = values_of(charts_of()["a"]["data"][0], "x")
    assert (steps[0], steps[-1], len(steps)) == (0, 2499, 2000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: run; nm compare --help lists the options."),
        (["nowhere"], "there is no folder 'nowhere' in"),
        (["runs", "--metrics", "x"], "unrecognized arguments: --metrics x"),
        (["runs", "--metric", "val/top2"], "has logged no 'val/top2'. Did you mean 'val/top1'?"),
        (["runs", "--report", "notes.html"], "--report: notes.html is no page of nm compare"),
        (["runs", "--report", "runs"], "--report: runs is a folder; name a file in it."),
        (["runs", "--report", "/dev/full"], "--report: /dev/full is not a regular file"),
        (["runs", "--report", "no/page.html"], "--report: there is no folder 'no' for 'page.html'"),
    ],
)
def test_compare_reports_bad_input_in_one_line(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = runs.parent / "notes.html"
    notes.write_text("mine")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert notes.read_text() == "mine"


def test_compare_imports_no_torch_and_plotly_for_the_page_only(runs: Path) -> None:
    code = (
        "import sys; from nmlightning.cli import main; {}; "
        "assert {{'torch', 'lightning', 'pytorch_lightning', *{}}}.isdisjoint(sys.modules)"
    )
    compare = code.format("assert main(['compare', 'runs']) == 0", ["matplotlib"])
    bad = code.format("assert main(['compare', 'no']) == 2", ["plotly", "matplotlib"])
    for command in (compare, bad):
        run_python("-c", command, cwd=runs.parent)

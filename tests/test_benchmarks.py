"""Test that the benchmarks run, and print a line for each thing that they measure."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interleaved
import pytest
import torch
from interleaved import Quartiles, quartiles_of_ratio, time_rounds
from saved_bytes import count_saved_bytes
from speed import TARGETS, measure, parse
from speed_gpu_layers import measure_gpu_layers
from speed_gpu_training import measure_cifar, measure_large_step
from speed_plan import QUICK
from speed_tables import summarise
from targets import Bound, Measurement
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"
LINES = {"normalised_weights": "bounded, gains", "weight_norms": "record"}


def run_script(name: str, *words: str) -> str:
    """Run a benchmark as a user does and return what it prints."""
    answer = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *words], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inputs", "kills", "disk"])
def test_a_storm_loses_nothing(part: str) -> None:
    words = ("--seed", "2", "--inputs", "100", "--kills", "7", "--processes", "1")
    assert re.search(
        rf"{part} +[1-9]\d* +[1-9]\d* +0 ", run_script("storm", "--only", part, *words)
    )


@pytest.mark.parametrize("name", LINES)
def test_shares_of_a_step_print_a_line_each(name: str) -> None:
    printed = run_script(name, "--net", "resnet20", "--batch", "2", "--rounds", "2")
    assert f"{LINES[name]} " in printed
    assert printed.count("% of a step") > 4


def test_image_reading_prints_images_per_second(make_image_folder: Callable[..., Path]) -> None:
    words = ["--rounds", "2", "--batch", "4", "--image_size", "32"]
    printed = run_script("image_reading", str(make_image_folder()), *words)
    assert printed.count(" images/s (") == 1


def test_translation_prints_training_and_decoding() -> None:
    sizes = {"vocab_size": 30, "width": 16, "hidden": 16, "heads": 2, "layers": 1, "batch": 4}
    words = [f"--{name}={value}" for name, value in {**sizes, "length": 6, "rounds": 2}.items()]
    printed = run_script("translation", *words)
    for line in (r"training: ours \d+ tokens/s, torch's layers \d+", r"decoding: with cache \d+ "):
        assert re.search(line + r".*ratio \d+\.\d\d \(", printed)


def test_time_rounds_shuffles_calls_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: float(next(clock)))
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = time_rounds(calls, 40, warm_up=3, repeats=2)
    rounds = ["".join(order[i : i + 6 : 2]) for i in range(0, len(order), 6)]
    assert len(rounds) == 43
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) == 6, "every order occurs"
    assert times == {name: [0.5] * 40 for name in "abc"}
    ratio = quartiles_of_ratio(
        {"own": [1.0, 4.0, 9.0], "other": [1.0, 2.0, 3.0]}, "own", to="other"
    )
    assert ratio == Quartiles(1.0, 2.0, 3.0)
    assert ratio.format() == "2.00 (1.00 to 3.00)"


def test_count_saved_bytes_counts_once_and_without_parameters() -> None:
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    conv, relu = nn.Conv2d(8, 8, 1), nn.ReLU()
    size = x.untyped_storage().nbytes()
    assert count_saved_bytes(conv, lambda: conv(x)) == size, "the input, not the weight"
    both = nn.Sequential(relu, conv)
    assert count_saved_bytes(both, lambda: both(x)) == size, "one tensor that both keep"
    norm = nn.Sequential(nn.BatchNorm2d(8), relu)
    kept = count_saved_bytes(norm, lambda: norm(x))
    assert 2 * size <= kept <= 2 * size + 5 * 8 * 4, "input, output and statistics"


def make_rows(*medians: float, bound: Bound | None) -> list[Measurement]:
    return [
        Measurement("C1", "ours / theirs", str(m), "formula", Quartiles(m / 2, m, 2 * m), bound)
        for m in medians
    ]


@pytest.mark.parametrize(
    ("medians", "bound", "verdict"),
    [
        ((0.5, 0.5), Bound(0.5), "met"),
        ((0.1, 0.6), Bound(0.5), "met on average, in 1 of 2"),
        ((0.4, 0.9), Bound(0.5), "missed, met in 1 of 2"),
        ((0.6,), Bound(0.5), "missed"),
        ((0.6,), Bound(0.5, is_least=True), "met"),
        ((0.6,), None, ""),
    ],
)
def test_summarise_says_whether_the_target_is_met(
    medians: tuple[float, ...], bound: Bound | None, verdict: str
) -> None:
    line = summarise(make_rows(*medians, bound=bound))
    assert line[6] == verdict
    assert float(line[2]) == pytest.approx(statistics.geometric_mean(medians), abs=0.006)
    assert line[3] == f"{min(medians) / 2:.2f} to {2 * max(medians):.2f}"


def test_speed_measures_every_target(tmp_path: Path) -> None:
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    answer = run_script("speed", "--quick", *words)
    found = json.loads(files["json"].read_text(encoding="utf-8"))
    rows = [*found["measured"], *found["skipped"]]
    assert {row["target"] for row in rows} == set(TARGETS)
    measured = {row["target"] for row in found["measured"]}
    assert {f"C{n}" for n in (1, 4, 5, 6, 7, 8, 9, 10, 11)} <= measured
    assert all(row["quartiles"]["median"] > 0 for row in found["measured"])
    table = files["markdown"].read_text(encoding="utf-8")
    assert f"torch {torch.__version__}" in table
    for line in table.splitlines():
        if line.startswith("|"):
            assert line.count("|") == 9
    assert "L1 BN / BN, fp32 NHWC" in table
    assert "target ≤ 0.75: " in answer


def test_speed_measures_only_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row.target for row in measure(QUICK, {"C7"})][-1] == "C7"
    with pytest.raises(SystemExit):
        parse(["--only", "C12"])
    assert "invalid choice: 'C12'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        (measure_gpu_layers, {"H1", "H2", "H3", "H4"}),
        (measure_large_step, {"H5"}),
        (measure_cifar, {"H6", "H7"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*bf16-mixed is not supported by the model summary")
def test_gpu_targets_run_on_the_cpu_too(rows: Any, targets: set[str]) -> None:
    results = list(rows(QUICK, targets, "cpu"))
    assert {row.target for row in results} == targets
    assert all(row.quartiles.median > 0 for row in results if isinstance(row, Measurement))

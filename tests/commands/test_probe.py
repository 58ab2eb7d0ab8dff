import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

from nmlightning.probe.report import CAVEAT
from quickstart_runs import SMALL, fit_in

UNTRAINED = "nm: no checkpoint is given; these weights are untrained."
Nm = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of a small ResNet."""
    return fit_in(tmp_path_factory.mktemp("trained"), "quickstart", *SMALL)


@pytest.fixture
def nm(nm: Nm) -> Nm:
    """Run `nm probe` in an empty folder and return what it answers."""
    return partial(nm, "probe")


def text(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def numbers(file: str = "n.json") -> Any:
    return json.loads(Path(file).read_text())


def test_probe_reports_on_a_config(nm: Nm) -> None:
    answer = nm("quickstart", *SMALL, "--batches", "3", "--bits", "8", "3", "--json", "n.json")
    out = text(answer.out)
    assert (answer.code, answer.err) == (0, [UNTRAINED])
    assert "L2 op by op in half would lose no channel: σ is between" in out
    assert CAVEAT in out
    assert out.endswith("picture norm_ranges.svg numbers n.json")
    found = numbers()
    assert found["batches"] == 3
    assert [layer["name"] for layer in found["layers"]][:2] == ["net.bn1", "net.layer1.0.bn1"]
    assert {layer["class"] for layer in found["layers"]} == {"L1BatchNorm2d"}
    assert found["layers"][0]["entries"] == 3 * 16
    assert "8 bits keep every direction." in out
    assert (found["int8"]["bits"], found["int8"]["batches"]) == ([8, 3], 3)
    assert [layer["name"] for layer in found["int8"]["layers"]][-1] == "net.fc"
    assert sorted(path.name for path in Path().iterdir()) == ["n.json", "norm_ranges.svg"]


def test_probe_finds_the_norms_that_fail(trained: Path, nm: Nm) -> None:
    """Scaled convolutions change nothing of the function, and everything of σ."""
    run = Path("runs/x/version_0")
    shutil.copytree(trained, run)
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=False)
    for name, power in (("layer1.0.conv1", -3), ("layer3.0.conv1", 4)):
        checkpoint["state_dict"][f"net.{name}.weight"] *= 10.0**power
    torch.save(checkpoint, last)
    answer = nm(last, "--json", "n.json", "--picture", "p.svg")
    out = text(answer.out)
    assert (answer.code, answer.err) == (0, [])
    lost = {layer["name"]: layer["lost"] for layer in numbers()["layers"]}
    failing = {name: ways["half_l2"] for name, ways in lost.items() if ways["half_l2"]}
    assert failing == {
        "net.layer1.0.bn1": {"gradient not finite": 1.0},
        "net.layer3.0.bn1": {"dead": 1.0},
    }
    assert all(ways[norm] == {} for ways in lost.values() for norm in ("l1", "linf", "top10"))
    share = (16 + 64) / (3 * 16 + 2 * 32 + 2 * 64)
    assert f"L2 op by op in half would lose {100 * share:.0f} % of the channels, in 2 of 7" in out
    assert "Swapping to l1 brings that to 0 % (L∞ 0 %, Top(10) 0 %, range 0 %)." in out
    assert Path("p.svg").read_text().count("100 %") == 2


def test_probe_uses_the_weights_of_the_checkpoint(trained: Path, nm: Nm) -> None:
    last = str(trained / "checkpoints" / "last.ckpt")
    before = (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    sizes = []
    for words in ([last], [str(trained / "config.yaml"), "--ckpt_path", last], ["quickstart"]):
        options = SMALL if words == ["quickstart"] else []
        assert nm(*words, *options, "--batches", "1", "--json", "n.json").code == 0
        sizes.append([layer["sigma"] for layer in numbers()["layers"]])
    assert sizes[0] == sizes[1] != sizes[2]
    assert (trained / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_probe_of_a_checkpoint_in_inference(trained: Path, nm: Nm) -> None:
    last = str(trained / "checkpoints" / "last.ckpt")
    answer = nm(last, "--inference", "--batches", "1", "--json", "n.json")
    assert answer.code == 0
    assert "inputs validation batches of its own data, 1 at most" in text(answer.out)
    (first, *_) = numbers()["layers"]
    assert (first["name"], first["kind"]) == ("net.bn1", "batch")
    assert set(first["lost"]) == {"float16", "bfloat16", "folded"}
    assert nm(last, "--inputs", "x.npz").err == [
        "nm: --inputs and --input_shape are for inference: add --inference."
    ]
    moved = shutil.copy(last, "moved.ckpt")
    assert "what moved.ckpt takes is not known: give" in text(nm(str(moved), "--inference").err)
    config = str(trained / "config.yaml")
    answer = nm(str(moved), "--inference", "--batches", "1", "--config", config)
    assert "inputs validation batches of its own data" in text(answer.out)


def test_probe_of_a_config_in_inference(nm: Nm) -> None:
    answer = nm("quickstart", *SMALL, "--inference", "--batches", "1", "--json", "n.json")
    assert (answer.code, answer.err[0]) == (0, UNTRAINED)
    layers = numbers()["layers"]
    assert [x["class"] for x in layers] == ["L1BatchNorm2d"] * 7
    assert {x["kind"] for x in layers} == {"batch"}
    np.savez("x.npz", np.ones((2, 3, 9, 9)))
    answer = nm("quickstart", *SMALL, "--inference", "--inputs", "x.npz")
    assert "inputs x.npz" in text(answer.out)


def test_probe_moves_no_weight(nm: Nm) -> None:
    """The first batch of two is the only one of one; a step between would move the second's σ."""
    words = ["quickstart", *SMALL, "--json", "n.json", "--batches"]
    found = []
    for rate in ("1e-9", "1e9"):
        assert nm(*words, "3", "--model.optimizer.lr", rate).code == 0
        found.append(numbers()["layers"])
    assert found[0] == found[1]


BAD_INPUT = {
    "": "the following arguments are required: CONFIG.CHECKPOINT.FILE.onnx.MODULE:NAME",
    "--data Digits": "the config or checkpoint comes first, got '--data'",
    "quickstar": "--config: no config 'quickstar'. Did you mean 'quickstart'?",
    "nope.ckpt": "--ckpt_path: there is no file 'nope.ckpt'",
    "lonely.ckpt": "there is no config.yaml of the run of",
    "quickstart --batches 0": "argument --batches: at least 1, got 0",
    "quickstart --bits 9": "argument --bits: invalid choice: 9 .choose from 2, 3, 4, 5, 6, 7, 8.",
    "quickstart --bathces 3": "there is no option '--bathces'",
    "quickstart --model.net.depth 7": "CifarResNet depth 7 is not 6n",
    "quickstart --inference --ckpt_path last": "--ckpt_path: runs/quickstart has no checkpoint yet",
    "quickstart --inference --bits 8": "--bits is for training, not for inference: leave it out",
    "quickstart --picture gone/a.svg": "--picture: there is no folder 'gone' for 'a.svg'",
    "quickstart --picture a.svg --json a.svg": "--json and --picture name the same file: give two",
    "quickstart --picture notes.txt": "--picture: notes.txt is no picture of nm probe; give",
    "quickstart --json notes.txt": "--json: notes.txt is no answer of nm probe; give another name.",
}


def test_probe_prints_whole_names_on_a_narrow_terminal(
    nm: Nm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    lines = nm("quickstart", *SMALL, "--batches", "1").out
    assert any(re.match(r" net\.layer3\.0\.bn2 .* 0 %", line) for line in lines)


@pytest.mark.parametrize(("words", "message"), BAD_INPUT.items())
def test_probe_reports_bad_input_in_one_line(words: str, message: str, nm: Nm) -> None:
    Path("notes.txt").write_text("mine")
    Path("lonely.ckpt").touch()
    code, out, err = nm(*shlex.split(words))
    assert (code, out) == (2, [])
    (line,) = [line for line in err if line != UNTRAINED]
    assert re.fullmatch(f"nm: {message}.*", line)
    assert len(list(Path().iterdir())) == 2


def test_probe_without_norms_that_have_a_scale_measures_the_layers(nm: Nm) -> None:
    swap = "[{class_path: NormSwap, init_args: {norm: mean}}]"
    answer = nm("quickstart", *SMALL, "--trainer.callbacks", swap, "--json", "n.json")
    assert answer.out[0] == (
        "There is no batch or layer norm to measure in ImageClassifier: MeanOnlyBatchNorm2d has no "
        "scale."
    )
    assert "The fewest bits that keep all" in text(answer.out)
    assert numbers()["int8"]["layers"]
    assert not Path("norm_ranges.svg").exists()


@pytest.fixture
def norm_file() -> str:
    """The name of an ONNX file of a layer norm of 16 features behind ids and numbers."""
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (int64[n, 16] ids, float[n, features] x) => '
        f"(float[n, 16] y) <float[16] w = {{{', '.join('1' * 16)}}}> "
        "{ i = Cast<to = 1>(ids) h = Add(i, x) y = LayerNormalization(h, w) }"
    )
    model.graph.node[-1].name = "/norm/LayerNormalization"
    onnx.save(model, "norm.onnx")
    return "norm.onnx"


def test_probe_of_an_onnx_file(nm: Nm, norm_file: str) -> None:
    x = 100 * np.random.default_rng(0).standard_normal((8, 16))
    np.savez("x.npz", ids=np.zeros((8, 16), int), x=x)
    answer = nm(norm_file, "--inputs", "x.npz", "--json", "n.json")
    out = text(answer.out)
    assert (answer.code, answer.err) == (0, [])
    assert "float16 sums would lose 100 % of the rows, in 1 of 1 layer (100 % zero)." in out
    assert out.endswith("inputs x.npz picture norm_ranges.svg numbers n.json")
    found = numbers()
    (layer,) = found["layers"]
    assert (layer["name"], layer["kind"], layer["entries"]) == ("norm", "layer", 8)
    assert (found["inputs"], found["lost"]["scaled"], found["lost"]["l1"]) == ("x.npz", 0, 0)
    assert layer["lost"]["float16_sums"] == {"dead": 1}
    assert "scaled" in Path("norm_ranges.svg").read_text()
    answer = nm(norm_file, "--input_shape", "16")
    assert "inputs random: these ranges say little; give --inputs" in text(answer.out)
    assert "Nothing is lost by float16, float16 sums, bfloat16, bfloat16 sums," in text(answer.out)


MODULE = """
from torch import nn
def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
"""


def test_probe_of_an_own_module(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path()))
    Path("probed_of_test.py").write_text(MODULE)
    np.savez("x.npz", np.ones((2, 3, 9, 9)))
    sources = {
        "--inputs x.npz": 1,
        "--input_shape 3,9,9": 1,
        "--data Digits --data.batch_size 4 --data.image_size 9 --batches 3": 3,
    }
    for source, batches in sources.items():
        assert nm("probed_of_test:make", *shlex.split(source), "--json", "n.json").code == 0
        assert [x["kind"] for x in numbers()["layers"]] == ["batch", "group"]
        assert (numbers()["batches"], "int8" in numbers()) == (batches, False)


BAD_MODELS = {
    "notes.onnx": "'notes.onnx' is no ONNX file, or is truncated",
    "norm.onnx": r"the shape of the input 'x' is \(n, features\): give arrays by --inputs, or the",
    "norm.onnx --inputs x.npz": "the inputs are x; norm.onnx takes ids, x",
    "norm.onnx --input_shape a": "argument --input_shape: give sizes such as 3,32,32, got 'a'",
    "norm.onnx --inputs x.npz --data Digits": "--inputs, --input_shape and --data are",
    "norm.onnx --inputs x.npz --nope 3": "there is no option '--nope'",
    "norm.onnx --input_shape 16 16 16": "3 shapes are given for ids, x",
    "norm.onnx --nope 3": "there is no option '--nope'",
    "bad_of_test:make": "what bad_of_test:make takes is not known: give --inputs x.npz",
    "bad_of_test:mkae": "bad_of_test has no 'mkae'. Did you mean 'make'",
    "bad_of_test:make --input_shape 4,9,9": "the model does not take these inputs: Given groups=1",
    "quickstart --inputs x.npz": "--inputs and --input_shape are for inference: add --inference",
}


@pytest.mark.parametrize(("words", "message"), BAD_MODELS.items())
def test_probe_reports_bad_models_in_one_line(
    words: str, message: str, nm: Nm, norm_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path()))
    Path("bad_of_test.py").write_text(MODULE)
    Path("notes.onnx").write_text("These are notes.")
    np.savez("x.npz", x=np.ones((2, 3)))
    code, out, (line,) = nm(*shlex.split(words))
    assert (code, out) == (2, [])
    assert re.match(f"nm: {message}", line)

"""Test `nm export` on a run of `nm fit`: the file, the lines, and one line for bad input."""

import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

from nmlightning import ImageClassifier, load_from_checkpoint
from nmlightning.export import formats
from nmlightning.models import CifarResNet
from quickstart_runs import LAST, SMALL, fit_in


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run, with L1 norms and bounded weights."""
    bounded = ("--trainer.callbacks+", "WeightNormSwap", "--trainer.callbacks.p", "1")
    folder = tmp_path_factory.mktemp("trained")
    return fit_in(folder, "quickstart", *SMALL, *bounded) / LAST


Nm = Callable[..., Any]


@pytest.fixture
def nm(nm: Nm) -> Nm:
    """Run `nm export` in an empty folder and return what it answers."""
    return partial(nm, "export")


@torch.no_grad()
def assert_same(net: Any, checkpoint: Path, size: int = 8) -> None:
    trained = load_from_checkpoint(ImageClassifier, checkpoint).eval()
    x = torch.randn(3, 3, size, size)
    y = trained(x)
    assert float((net(x) - y).abs().max() / y.abs().max()) <= 1e-5


def plain_net(file: str | Path) -> CifarResNet:
    net = CifarResNet(8).eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    return net


def test_export_writes_a_state_dict_beside_the_checkpoint(nm: Nm, trained: Path) -> None:
    answer = nm(trained, "--format", "state_dict")
    file = trained.with_suffix(".pt")
    assert answer.code == 0
    assert answer.err == []
    assert answer.out[:-2] == [
        " network     CifarResNet, inputs N × 3 × 8 × 8",
        f" file        {file} (state_dict, {file.stat().st_size / 1e3:.1f} kB)",
        " batch norms 7 folded into the layers before them; each stays as a shift, to keep "
        "its keys (--no_fold to train further)",
        " weights     7 no longer parametrized",
    ]
    difference = r" difference  \d\.\de-\d\d of the largest output, at most 1e-05 \(random inputs, "
    assert re.match(difference, answer.out[-2])
    use = answer.out[-1].removeprefix(" use         ")
    net = CifarResNet(8).eval()
    exec(use, {"torch": torch, "net": net})
    assert_same(net, trained)
    file.unlink()


def test_export_writes_a_torch_export_program(nm: Nm, trained: Path) -> None:
    answer = nm(trained, "--format", "torch_export", "--output", "net.pt2")
    assert answer.code == 0
    assert answer.out[2] == " batch norms 7 folded into the layers before them"
    program = torch.export.load("net.pt2").module()
    assert_same(program, trained)
    assert answer.out[-1] == " use         torch.export.load('net.pt2').module()(x)"


@pytest.fixture(scope="module")
def trained_in_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_in(tmp_path_factory.mktemp("int8"), "quickstart_int8", *SMALL) / LAST


def test_export_writes_a_network_in_int8(nm: Nm, trained_in_int8: Path) -> None:
    answer = nm(trained_in_int8, "--format", "onnx", "--output", "net.onnx")
    assert answer.code == 0
    assert answer.out[2:5] == [
        " batch norms 0 folded into the layers before them",
        " not folded  bn1, layer1.0.bn1, layer1.0.bn2 and 4 more: its input is quantised",
        " int8        15 inputs quantised, weights in the file as int8",
    ]
    net = load_from_checkpoint(ImageClassifier, trained_in_int8).eval().requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    use = answer.out[-1].removeprefix(" use         ")
    (y,) = eval(use, {"onnxruntime": onnxruntime, "x": x})
    # A value between two numbers of a grid may go to either.
    assert float((torch.from_numpy(y) - net(x)).abs().max() / net(x).abs().max()) <= 0.02


def test_export_names_the_inputs_and_only_norms_that_there_are(nm: Nm) -> None:
    np.savez("x.npz", np.ones((2, 4), np.float32))
    answer = nm("torch.nn:Identity", "--format", "torch_export", "--inputs", "x.npz")
    assert [line.split()[0] for line in answer.out] == ["network", "file", "difference", "use"]
    assert answer.out[2].endswith("(x.npz, batches of 1, 2, 5)")


def test_export_keeps_norms_without_folding(nm: Nm, trained: Path) -> None:
    answer = nm(trained, "--format", "state_dict", "--output", "a.pt", "--no_fold")
    assert answer.out[2] == " batch norms none folded (--no_fold)"
    saved = torch.load("a.pt", weights_only=True)
    module = load_from_checkpoint(ImageClassifier, trained)
    assert torch.equal(saved["bn1.running_var"], module.net.bn1.running_var)


def test_export_replaces_a_file_only_on_request(nm: Nm, trained: Path) -> None:
    Path("a.pt").write_text("mine")
    words = (trained, "--format", "state_dict", "--output", "a.pt")
    code, _, (line,) = nm(*words)
    assert (code, line) == (
        2,
        "nm: 'a.pt' exists already; name another file, or give overwrite=True (--overwrite).",
    )
    assert nm(*words, "--overwrite").code == 0
    assert_same(plain_net("a.pt"), trained)


def test_export_reads_a_checkpoint_in_half(nm: Nm, trained: Path) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {
        key: value.half() if value.is_floating_point() else value for key, value in weights.items()
    }
    torch.save(checkpoint, "half.ckpt")
    words = ("--format", "state_dict", "--input_shape", "3,16,16")
    assert nm("half.ckpt", *words).code == 0
    assert_same(plain_net("half.pt"), Path("half.ckpt"), size=16)


# ---- where the model and the shape are from ----


def test_export_needs_the_shape_for_a_checkpoint_without_a_run(nm: Nm, trained: Path) -> None:
    shutil.copy(trained, "a.ckpt")
    words = ("a.ckpt", "--format", "state_dict")
    code, _, (line,) = nm(*words)
    assert code == 2
    assert line == (
        "nm: the shape of an input is not known: no config.yaml of its run is beside it. Give it "
        "by --input_shape, such as 3,32,32."
    )
    Path("data.yaml").write_text("data: {class_path: Digits, init_args: {image_size: 9}}")
    assert " inputs N × 3 × 9 × 9" in nm(*words, "--config", "data.yaml").out[0]
    given = nm(*words, "--input_shape", "3,12,12", "--overwrite")
    assert " inputs N × 3 × 12 × 12" in given.out[0]
    Path("data.yaml").write_text("data: LightningDataModule")
    (line,) = nm(*words, "--config", "data.yaml", "--overwrite").err
    assert "is not known: LightningDataModule has none. Give it by --input_shape" in line


OWN = """
import torch
from pytorch_lightning import LightningModule
class Own(LightningModule):  # remembers nothing in its checkpoints
    def __init__(self, width: int = 4):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.BatchNorm1d(3))
"""


def test_export_writes_a_users_module(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("own_module.py").write_text(OWN)
    state = {"body.0.weight": torch.ones(3, 5), "body.0.bias": torch.ones(3)}
    norm = {f"body.1.{key}": value for key, value in torch.nn.BatchNorm1d(3).state_dict().items()}
    folder = Path("version_3/checkpoints")
    folder.mkdir(parents=True)
    checkpoint = folder / "last.ckpt"
    torch.save({"state_dict": {**state, **norm}, "pytorch-lightning_version": "2.6.0"}, checkpoint)
    words = (checkpoint, "--format", "state_dict", "--input_shape", "5", "--output", "own.pt")
    (line,) = nm(*words).err
    assert "last.ckpt' does not name the class of its model, and there is no config.yaml of" in line
    config = {"model": {"class_path": "own_module.Own", "init_args": {"width": 5}}}
    Path("version_3/config.yaml").write_text(yaml.safe_dump(config))
    (line,) = nm(*words).err
    assert line.startswith("nm: version_3/config.yaml names own_module.Own, of no installed")
    words += ("--config", "version_3/config.yaml")
    (line,) = nm(*words).err
    assert line == "nm: --module: Own has no module 'net'; it has body."
    answer = nm(*words, "--module", "body")
    assert answer.out[2].startswith(" batch norms 1 folded")
    other = {"model": {"class_path": "own_module.Own", "init_args": {"width": 6}}}
    Path("other.yaml").write_text(yaml.safe_dump(other))
    (line,) = nm(*words, "--module", "body", "--config", "other.yaml", "--overwrite").err
    assert re.search("last.ckpt' does not fit: Error.* size mismatch for body.0.weight", line)
    assert len(line) < 400


# ---- bad input: one line on stderr, exit code 2 ----

BAD_INPUT = {
    "": "required: CHECKPOINT; nm export --help lists the options",
    "http://h/a.ckpt --format onnx": "takes a file, not an address: download http:/h/a.ckpt",
    "nope.ckpt --format onnx": "there is no file 'nope.ckpt' in /",
    ". --format onnx": r"'\.' is a folder; of a sharded checkpoint make a file by python -m",
    "LAST": "required: --format",
    "LAST --format onxx": "--format is 'state_dict' or 'onnx' or .*, got 'onxx'. .* 'onnx'",
    "LAST --format onnx --input_shape 3x8": "--input_shape: give sizes such as 3,32,32, got '3x8'",
    "LAST --format onnx --input_shape 3,0": "--input_shape: give sizes such as 3,32,32, got '3,0'",
    "LAST --format onnx --output no/x.onnx": "there is no folder 'no' to write 'x.onnx' into",
    "LAST --format torch_export --output x.pt": "must end in .pt2, got 'x.pt'",
    "LAST --format onnx --half-safe foo": "--half-safe.* choice: 'foo' .*scaled.*l1",
    "LAST --format state_dict --half-safe l1": "to swap: give --format onnx or torch_export",
    "torch.nn:Identity --format onnx": "nm: give --input_shape, such as 3,32,32, or --inputs x.npz",
    "torch.nn:Identity --format onnx --input_shape 4 --half-safe l1": "give --inputs x.npz",
    "torch.nn:Identity --format onnx --input_shape 4 --config x": "--config would change",
    "LAST --format onnx --input_shape 4 --inputs x.npz": "leave --input_shape out",
    "a.onnx --half-safe scaled --no_fold --module net": "--no_fold, --module would change noth",
    "LAST --format onnx --fold": "unrecognized arguments: --fold",
    "LAST --format onnx --module nte": "ImageClassifier has no module 'nte'; it has net.*'net'",
    "LAST --format onnx --input_shape 5": "does not take inputs of shape 5: ",
    "LAST --format onnx --config nope": "--config: no config 'nope'",
    "LAST --format onnx --config 'model: {class_path: gone.Net}\n'": "cannot import 'gone.Net'",
    "LAST --format onnx --config cifar_l1": "The checkpoint is from another network",
    "text.ckpt --format onnx": "'text.ckpt' is not a checkpoint, or is truncated",
    "zip.ckpt --format onnx": "'zip.ckpt' is not a checkpoint, or is truncated",
    "empty.ckpt --format onnx": "'empty.ckpt' holds no weights",
    "tensor.ckpt --format onnx": "'tensor.ckpt' holds no weights",
    "objects.ckpt --format onnx": "'objects.ckpt' holds objects, which may run code",
    "gone.ckpt --format onnx --input_shape 3,8,8": "model.net: cannot import 'gone.Net' .No module",
    "python.ckpt --format onnx --input_shape 3,8,8": "does not name the class of its model",
}


@pytest.fixture
def _files(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as file:
        file.writestr("a", "b")
    checkpoint = torch.load(trained, weights_only=True)
    for name, content in {
        "empty": {"state_dict": {}},
        "tensor": torch.ones(2),
        "objects": {**checkpoint, "where": Path()},
        "gone": {
            **checkpoint,
            "hyper_parameters": {
                **checkpoint["hyper_parameters"],
                "net": {"class_path": "gone.Net"},
            },
        },
        "python": {**checkpoint, "hyper_parameters": {"label_smoothing": 0.0}},
    }.items():
        torch.save(content, tmp_path / f"{name}.ckpt")


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize(("words", "expected"), BAD_INPUT.items(), ids=str)
def test_export_reports_bad_input(nm: Nm, trained: Path, words: str, expected: str) -> None:
    code, out, (line,) = nm(*shlex.split(words.replace("LAST", shlex.quote(str(trained)))))
    assert (code, out) == (2, [])
    assert line.startswith("nm: ")
    assert re.search(expected, line), line
    assert not trained.with_suffix(".onnx").exists()


def write_onnx(steps: str, opset: int = 23) -> None:
    """Write a.onnx, a graph of x, whose sizes are not fixed, with weights w."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N, M, 8] x) => '
    values = "(float[N, M, 8] y) <float[8] w = {1, 1, 1, 1, 1, 1, 1, 2}>"
    onnx.save(onnx.parser.parse_model(f"{head}{values} {{ {steps} }}"), "a.onnx")


NORMS = (
    "z = LayerNormalization(x, w)\nq = InstanceNormalization(z, w, w)\ny = RMSNormalization(q, w)"
)


def test_export_rewrites_an_onnx_file(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_onnx(NORMS)
    np.savez("x.npz", x=np.random.randn(2, 8, 8).astype(np.float32))
    answer = nm("a.onnx", "--half-safe", "scaled", "-o", "safe.onnx", "--inputs", "x.npz")
    assert answer.code == 0
    lines = [re.sub(r"\d\.\de-\d\d", "E", line) for line in answer.out]
    assert [re.sub(r"\d+\.\d kB", "SIZE kB", line) for line in lines] == [
        " rewritten   1 layer norm, 1 RMS norm",
        " left        q: instance norms are not rewritten",
        " error       E of a norm's largest output, against float64",
        " difference  E of the largest output (x.npz, onnxruntime)",
        " file        safe.onnx (SIZE kB)",
        " use         onnxruntime.InferenceSession('safe.onnx')",
    ]
    assert nm("a.onnx", "--half-safe", "scaled").out[3].startswith(" difference  not compared: ")
    drawn = nm("a.onnx", "--half-safe", "scaled", "--overwrite", "--input_shape", "8,8")
    assert drawn.out[3].endswith(" of the largest output (random inputs, onnxruntime)")
    again = " ".join(nm("a_half_safe.onnx", "--half-safe", "scaled").err)
    assert again.endswith("q: instance norms are not rewritten; z, y: half-safe already.")


@pytest.mark.parametrize(
    ("steps", "words", "error"),
    [
        (NORMS, "--half-safe l1", "needs the model's source and data"),
        (NORMS, "", "--half-safe is missing: of an ONNX file norms are rewritten, by nm export a."),
        (NORMS, "--format onnxx", "--format is 'state_dict'"),
        (NORMS, "--half-safe scaled --format state_dict", "--format state_dict: of an ONNX file "),
        (NORMS, "--half-safe all", "--half_safe: invalid choice: 'all' (choose"),
        (NORMS, "--half-safe scaled -o a.onnx --overwrite", "'a.onnx' is what is read: name anoth"),
        (NORMS, "--half-safe scaled -o a.onnx", "'a.onnx' exists already"),
        (NORMS, "--half-safe scaled --inputs no.npz", "--inputs: there is no file 'no.npz'"),
        ("y = Add(x, w)", "--half-safe scaled", "it has no layer or RMS norm."),
        ("y = Add(x, w)", "--half-safe scaled", "is of opset 9, older than 11"),
        ("", "--half-safe scaled", "'a.onnx' is no ONNX file"),
    ],
)
def test_what_cannot_be_rewritten_is_one_line(nm: Nm, steps: str, words: str, error: str) -> None:
    write_onnx(steps, 9 if "opset" in error else 23)
    answer = nm("a.onnx", *words.split())
    assert answer.code == 2
    assert error in " ".join(answer.err)
    assert [file.name for file in Path().iterdir()] == ["a.onnx"]


def test_files_cut_short_are_one_line(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    write_onnx(NORMS)
    Path("a.onnx").write_bytes(Path("a.onnx").read_bytes()[:-9])
    assert "'a.onnx' is no ONNX file" in nm("a.onnx", "--half-safe", "scaled").err[0]
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert "pip install onnx" in nm("a.onnx", "--half-safe", "scaled").err[0]


@pytest.mark.parametrize("words", [("export", "--half-safe", "scaled"), ("probe",)])
def test_what_is_no_onnx_file_is_one_line(nm: Nm, words: tuple[str, ...]) -> None:
    Path("dir.onnx").mkdir()
    Path("text.onnx").write_text("a text")
    Path("empty.onnx").write_text("")
    errors = {
        "dir": "is a folder; name the",
        "gone": "is no file",
        "text": "is no ONNX file, or is",
        "empty": "is no ONNX file, or is",
    }
    for name, error in errors.items():
        answer = nm.func(words[0], f"{name}.onnx", *words[1:])  # type: ignore[attr-defined]
        assert answer.code == 2
        assert error in " ".join(answer.err)


def test_inputs_that_a_file_does_not_take_are_refused(nm: Nm) -> None:
    write_onnx(NORMS)
    x = np.ones((2, 8, 8), np.float32)
    cases = {"name": {"z": x}, "shape": {"x": x[:, :, :7]}, "rank": {"x": x[0]}}
    errors = (
        "a.onnx takes x",
        "cannot run a.onnx: .*invalid dimensions",
        "cannot run a.onnx: .*rank",
    )
    for (name, arrays), error in zip(cases.items(), errors, strict=True):
        np.savez(f"{name}.npz", **arrays)
        answer = nm("a.onnx", "--half-safe", "scaled", "--inputs", f"{name}.npz")
        assert answer.code == 2
        assert re.search(error, " ".join(answer.err))
        assert not Path("a_half_safe.onnx").exists()

"""Test what a user of `nm` sees: the runs it keeps, the lines it prints, the exit codes."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import nmlightning
from nmlightning import callbacks, datamodules, optim
from nmlightning.cli import COMMANDS
from nmlightning.commands.files import shipped_configs
from nmlightning.tasks.classification import ImageClassifier
from quickstart_runs import DIGITS, LAST, fit_in
from scripts import run_python

FIT = ["fit", "--config", "quickstart", *DIGITS]
UNTRAINED = "nm: no --ckpt_path is given; these weights are untrained."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, with options that the config does not have."""
    folder = tmp_path_factory.mktemp("trained")
    return fit_in(folder, "quickstart", *DIGITS, "--model.label_smoothing", "0.25")


Nm = Callable[..., Any]


def has(pattern: str, lines: list[str]) -> bool:
    return any(re.search(pattern, line) for line in lines)


# ---- before anything is imported ----


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--version", "nmlightning"),
        ("--help", "nm fit --config"),
        ("", "nm fit --config"),
        ("probe nope", "no config 'nope'"),
        ("export a.ckpt --format onxx", "Did you mean 'onnx'?"),
    ],
)
def test_cli_answers_without_importing_torch(words: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    code = f"import sys, nmlightning.cli as c; c.main({words.split()}); print(*sys.modules)"
    done = run_python("-c", code, cwd=tmp_path)
    assert answer in done.stdout + done.stderr
    assert {"torch", "pytorch_lightning", "jsonargparse", "onnx"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("words", ["--help", "kernels show"])
def test_output_that_nobody_reads_ends_a_command_as_sigpipe_does(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nmlightning", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    ("words", "safe", "runs_here"),
    [
        ("compare nowhere", "", False),
        ("fit --model mine.Net --data Digits", "", True),
        ("fit --model mine.Net --data Digits", "1", False),
    ],
)
def test_cli_imports_from_the_current_folder_only_classes_that_it_is_given(
    words: str, safe: str, runs_here: bool, tmp_path: Path
) -> None:
    for name in ("csv", "statistics", "mine"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} has run')")
    code = "import sys; del sys.path[0]; " * (not safe) + "from nmlightning.cli import main; main()"
    answer = run_python("-c", code, *words.split(), cwd=tmp_path, PYTHONSAFEPATH=safe)
    assert ("mine has run" in answer.stdout) == runs_here, answer
    assert not re.search("(csv|statistics) has run", answer.stdout)


def test_cli_help_names_commands_and_configs(nm: Nm) -> None:
    lines = nm("--help").out
    assert max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)
    text = " ".join(line.strip() for line in lines)
    groups = re.findall(r"(\w+_)…[^:]*: ([\w ]+?)(?= \w+_…|$)", text)
    names = {start + end for start, ends in groups for end in ends.split()}
    assert names | {"quickstart", "quickstart_int8", "translate_quickstart"} == set(
        shipped_configs()
    )


MAIN = "import sys\nfrom nmlightning.cli import main\nsys.exit(main())\n"
SCRIPTS = {
    "mine": MAIN,
    "shim": "import os, sys\nos.execvp('nm', sys.argv)\n",  # it finds ours again, as pyenv's does
    "copy": MAIN,
    "other": "import sys\nprint('other', *sys.argv[1:], input())\nsys.exit('exits')\n",
}
FOR_OTHERS = (["a file"], ["-D", "x"], ["--demangle", "fit"], ["@args"], ["gone.o"])
FOR_US = (["fitt"], ["--config", "a file"], ["b.yaml"], ["mine/"], [], ["-V"])


@pytest.mark.parametrize("words", [*FOR_OTHERS, *FOR_US], ids=" ".join)
def test_nm_hands_files_and_options_of_another_nm_to_it(words: list[str], tmp_path: Path) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "nm").write_text(f"#!{sys.executable}\n{text}")
        (tmp_path / name / "nm").chmod(0o755)
    (tmp_path / "linked").symlink_to(tmp_path / "copy")
    (tmp_path / "a file").touch()
    (tmp_path / "nmlightning").symlink_to(tmp_path / "mine" / "nm")
    env = os.environ | {"PYTHONPATH": str(Path(nmlightning.__file__).parents[1])}

    def run(program: str, *folders: str) -> tuple[int, str, str]:
        given: Any = {"cwd": tmp_path, "input": "in", "capture_output": True, "text": True}
        path = os.pathsep.join(str(tmp_path / name) for name in folders)
        done = subprocess.run([tmp_path / program, *words], env=env | {"PATH": path}, **given)
        return done.returncode, done.stdout, done.stderr

    alone = run("nmlightning", "other")
    answer = (1, f"other {' '.join(words)} in\n", "exits\n") if words in FOR_OTHERS else alone
    assert run("mine/nm", "mine", "shim", "linked", "other") == answer
    if words in FOR_OTHERS:
        none = f"nm: there is no command {words[0]!r}. nm --help lists them.\n"
        assert run("mine/nm", "mine", "linked") == alone == (2, "", none)


# ---- bad input: one line on stderr, exit code 2 ----

TRACK = "--trainer.callbacks+ WeightNormTracker"
CORRECT = (
    f"{TRACK} --model.weight_decay_scope last_layer --trainer.callbacks.steering LRCorrection "
    "--trainer.callbacks.steering.reference"
)
ALL = nmlightning.__all__
RULES = sorted(vars(optim).keys() & set(ALL) - {"InverseSquareRootLR"})
BAD_INPUT = {
    "fitt": "no command 'fitt'. Did you mean 'fit'? nm --help lists them.",
    "fit": "required: --data, --model; or give a config that has them, such as --config quickstart",
    "fit --config nope.yaml": "no config 'nope.yaml'. Files are .* nm --help lists the shipped",
    "fit --config configs/cifar_l3.yaml": "'configs/cifar_l3.yaml'. Did you mean 'cifar_l2'?",
    "fit --config CIFAR_L1": "no config 'CIFAR_L1'. Did you mean 'cifar_l1'?",
    "fit --config resnet56": "mean one of cifar_adamh, .*, cifar_top10_paper and 1 more?",
    "fit --config resnet": "mean one of imagenet_resnet18_int8, .*, imagenet_resnet50_wn?",
    "fit --config 'trainer: [\n'": "is not YAML: .* in line 2",
    "fit --config 'a: &a [*a]\n'": "is not YAML: .a refers to itself in line 1",
    "--trainer '{max_epochs: 1, max_epochs: 2}'": "trainer: the key 'max_epochs' is given twice",
    f"fit --config {'x' * 300}": "--config: 'x+' cannot be read: File name too long.",
    "fit --config '{}' --ckpt_path nope.ckpt": "--ckpt_path: there is no file 'nope.ckpt' in ",
    "fit --config '{}' --ckpt_path best": "'best' .* give the path of a checkpoint, or 'last' for",
    "fit --config 'ckpt_path: best\n'": "--ckpt_path: 'best' .* give the path of a checkpoint",
    "fit --config": "argument -c/--config: expected one argument",
    # Keys
    "--trainer.max_epoch 3": "'--trainer.max_epoch'. Did you mean '--trainer.max_epochs'?",
    "--modle.net VGG": "no option '--modle.net'. Did you mean '--model.net'?",
    "--config '{trainer: {max_epoch: 3}}'": "'trainer.max_epoch'. .* 'trainer.max_epochs'?",
    "--config '{trianer: {max_epochs: 3}}'": "Did you mean 'trainer.max_epochs'?",
    "--model.nett VGG": "model has no option 'nett'; ImageClassifier takes net, opt.*'net'?",
    "--model.net.dpeth 20": "model.net has no option 'dpeth'; CifarResNet takes depth, .*'depth'?",
    "--config '{model: {init_args: {net: {init_args: {dpeth: 2}}}}}'": "Did you mean 'depth'?",
    "--model.optimizer.lrr 1": "model.optimizer has no option 'lrr'; SGD takes lr, .* mean 'lr'?",
    "--data.rot x": "data has no option 'rot'; Digits takes batch_size, image_size, channels.",
    "fit --data.rot x --config quickstart": "data has no option 'rot' before its class is known",
    "--trainer.callbacks.nrm l1": "callbacks has no option 'nrm'; NormSwap takes norm, .*'norm'?",
    "stray": "unexpected argument 'stray'",
    # Class names
    "--config '{data: {class_path: CIFAR_10}}'": "Did you mean 'CIFAR10'?",
    "--model.net VGG": "several classes 'VGG'; give one of .*nmlightning.VGG",
    "--model.net foo.Bar": "net: cannot import 'foo.Bar' .No module named 'foo'.; give .*Cifar",
    "--model.optimizer nmlightning.optim.Spare": "cannot import 'nmlightning.optim.Spare' ",
    "--model nmlightning.ImageClassifier --model.net torch.nn.Lin": "import 'torch.nn.Lin' .module",
    "--config /dev/null": "--config: '/dev/null' is not a regular file",
    "--ckpt_path .": "--ckpt_path: '.' is a folder without a sharded checkpoint",
    "--ckpt_path HTTPS://h/a.ckpt": "--ckpt_path: write https:// for HTTPS://",
    f"--trainer.max_epochs {'x' * 99}": f"received '{'x' * 58}….$",
    "--model.net nmlightning.models.CifarResNt": "cannot import .* Did you mean 'CifarResNet'?",
    "--model.net torch.nn.functional.relu": "model.net: '.*relu' is not a subclass of Module.",
    "--model.net torch.relu": "model.net: no signature found for builtin",
    "--model.optimizer Sdg": "no class 'Sdg'; give .*ASGD, .*Did you mean 'SGD'?",
    "--trainer.logger CSVLoggr": "Did you mean 'CSVLogger'?",
    "--trainer.callbacks NormSwapp": "no class 'NormSwapp'; give Int8Swap, .*mean 'NormSwap'?",
    "--config '{trainer: {callbacks: [3]}}'": "trainer.callbacks: there is no class '3'; give Int8",
    "--config '{model: 3}'": "nm: model: there is no class '3'; give ImageClassifier, Trans",
    "--config '{model: {init_args: {optimizer: 3}}}'": "optimizer: there is no class '3'; give .*A",
    # Values
    "--model.net.depth twenty": "model.net.depth: expected int, received 'twenty'.",
    "--model.net.depth 21": "depth 21 is not 6n . 2",
    "--model.net.activation tanh": "expected one of 'relu', 'trelu', received 'tanh'.",
    "--model.net null": "model: ImageClassifier needs net.",
    "--model.lr_scheduler.milestones x": "milestones: expected a list, received 'x'.",
    "--model.weight_decay_scope nonorm": "one of 'all', 'no_norm', .* Did you mean 'no_norm'?",
    "--config '{trainer: 3}'": "trainer holds options, such as {max_epochs: 3}, received 3.",
    "--config '{trainer: {max_epochs: x}}'": "nm: trainer.max_epochs: expected int or null, rec",
    "--trainer.precision 16-mixd": "received '16-mixd'. Did you mean '16-mixed'?",
    "--trainer.strategy dpp": "trainer: You selected an invalid strategy name",
    "--trainer.strategy ddp_spawn": "trainer.strategy: ddp_spawn trains copies of .*; use ddp.",
    "--model.optimizer.lr -1": "optimizer: Invalid learning rate: -1.0.",
    "--ckpt_path http://h/a.ckpt --weights_only false": "false: download the checkpoint before, if",
    "--model.optimizer.lr .nan": "model.optimizer.lr is nan; give a finite number.",
    "--model.optimizer.lr .inf": "optimizer: lr of SGD is inf; give a finite number.",
    "--model.lr_scheduler.gamma .inf": "model.lr_scheduler.gamma is inf; give a finite number.",
    "--trainer.gradient_clip_val -1": "trainer.gradient_clip_val is at least 0, got -1.",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches is above 0, got 0.",
    "--model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 0": "T_max is above 0, got",
    "--trainer.max_epochs ''": "trainer.max_epochs: expected int or null, received ''.",
    "--trainer.callbacks '{class_path: WeightNormTracker, init_args: {every: []}}'": "backs.every:",
    "--config '{trainer: {1: 2}}'": "nm: there is no option '1'.",
    "--ckpt_path /dev/zero": "--ckpt_path: '/dev/zero' is neither a file nor a folder.",
    "--ckpt_path foo://a.ckpt": "the checkpoint foo://a.ckpt cannot be read: Protocol not known",
    "--model.optimizer Adam --trainer.precision 16-true": (
        "optimizer: eps=1e-08 of Adam is 0 in float16, as .* parameters are, .*: give eps=1e-4"
    ),
    "--seed_everything -5": "seed_everything must be between 0 and 4294967295, got -5.",
    # Norms
    "--trainer.callbacks.norm l_1": "'l_1'.*Did you mean 'l1'?",
    "--trainer.callbacks.norm topk --trainer.callbacks.options '{k: 9999999}'": "9999999.* n ",
    f"--trainer.callbacks.norm range --trainer.callbacks.options '{{chunks: {10**30}}}'": "chunks",
    # Weight norms
    f"{TRACK} --trainer.callbacks.every 0": "every is 'epoch' or a number of steps .*, got 0",
    f"{TRACK} --trainer.callbacks.include '[conv]'": "'conv' matches no weight of two or more dim",
    f"{TRACK} --model.optimizer.weight_decay 0.1 --trainer.callbacks.steering Hyperball": (
        "has weight decay 0.1 in its optimizer"
    ),
    f"{CORRECT} nowhere": "no recording of weight norms at nowhere",
    # Data
    "--data CIFAR10 --data.download false": "CIFAR-10 is not in .*--data.root.*--data Digits",
    "--data.batch_size 0": "batch_size must be a whole number of at least 1, got 0.",
    # What only the libraries notice
    "--trainer.limit_train_batches 0.0001": "0.0001",
    "--model.net.num_classes 1000000000000": "not enough memory; a smaller network, image or batch",
    "--data.image_size 20000": "not enough memory; a smaller network, image or batch",
    "--model.net.in_channels 4": "channels",
    "--trainer.max_time x": "trainer: ",
    "--data NumberNames --trainer.callbacks null": "takes images and labels, got a Trans",
    "--trainer.num_nodes 3": "num_nodes is 3, and nothing says where .* MASTER_ADDR",
    "--trainer.devices 5000": "trainer.devices is at most .* on this machine, got 5000.",
    "--trainer.precision transformer-engine": "together: Requirement 'transformer_engine",
    "--trainer.callbacks+ BackboneFinetuning": "together: 'ImageClassifier' .* 'backbone'",
    "--model.optimizer.lr '{x: 1}'": "together: no signature found .*'torch.Tensor'",
}

SHOWN_LATE = {
    "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor x": "together: Early stopping",
    "--trainer.max_epochs 2 --trainer.callbacks+ ModelCheckpoint --trainer.callbacks.filename "
    "'{epoch' --trainer.callbacks.every_n_epochs 2": "together: expected '}' before end of string",
}


@pytest.mark.parametrize(
    ("words", "offered", "meant"),
    [
        ("--data NumberNamez", datamodules.__all__, "NumberNames"),
        ("--model Translatr", ["ImageClassifier", "Translator"], "Translator"),
        ("--trainer.callbacks+ NormSwp", sorted(vars(callbacks).keys() & ALL), "NormSwap"),
        (f"{TRACK} --trainer.callbacks.steering Hyperbal", RULES, "Hyperball"),
    ],
)
def test_unknown_class_offers_exports(nm: Nm, words: str, offered: list[str], meant: str) -> None:
    (line,) = nm(*FIT, *shlex.split(words)).err
    given = f"; give {', '.join(offered)} or a class path. Did you mean {meant!r}?"
    assert line.endswith(given), line


@pytest.mark.parametrize(("words", "expected"), [*BAD_INPUT.items(), *SHOWN_LATE.items()], ids=str)
def test_cli_reports_bad_input_in_one_line(nm: Nm, words: str, expected: str) -> None:
    given = shlex.split(words)
    answer = nm(*given) if given[0].startswith("fit") else nm(*FIT, *given)
    assert answer.code == 2
    (line,) = answer.err
    assert line.startswith("nm: ")
    assert re.search(expected.replace("?", r"\?"), line), line
    assert words in SHOWN_LATE or not any(Path("runs").glob("*/*")), "a refused run is kept"


def test_cli_keeps_the_traceback_of_an_unexpected_error(
    nm: Nm, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ImageClassifier, "training_step", fail)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError, match="a bug") as raised:
        nm(*FIT)
    sys.excepthook(raised.type, raised.value, raised.tb)
    *_, bug, report = capfd.readouterr().err.splitlines()
    assert bug == "RuntimeError: a bug"
    assert report.startswith("nm: unexpected error")
    assert "nm doctor" in report


def test_cli_names_a_file_that_a_thread_cannot_write(nm: Nm, monkeypatch: Any) -> None:
    def run(_: list[str]) -> int:
        thread = threading.Thread(target=Path("/dev/full").write_text, args="x")
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr("nmlightning.commands.compare.run", run)
    assert nm("compare").err == ["nm: /dev/full cannot be written: No space left on device."]


# ---- configs by name ----


def test_fit_prefers_a_file_to_a_shipped_config(nm: Nm) -> None:
    Path("quickstart.yaml").write_text("trainer: {max_epoch: 1}\n")
    (line,) = nm("fit", "--config", "quickstart.yaml").err
    assert "trainer.max_epoch" in line
    assert nm("fit", "--config", "configs/quickstart.yaml", *DIGITS).code == 0
    Path("cifar_l1").touch()
    (line,) = nm("fit", "--config", "cifar_l1").err
    assert line.endswith("is empty; it stands before the shipped config of that name: rename it.")


def test_fit_prints_a_name_in_brackets(nm: Nm) -> None:
    Path("a[red]b.yaml").write_text(shipped_configs()["quickstart"].read_text())
    answer = nm("fit", "--config", "a[red]b.yaml", *DIGITS)
    run = "runs/a[red]b/version_0"
    assert answer.out[0].endswith(f"→ {run}")
    assert answer.out[-8:-6] == [f" run         {run}", f" checkpoint  {run}/{LAST}"]


def test_fit_on_other_data_notices_16_mixed_without_a_gpu_once(nm: Nm) -> None:
    words = ["--config", "cifar_l2", "--data", "Digits", *DIGITS, "--model.net.depth", "20"]
    answer = nm("fit", *words)
    (line,) = answer.err
    assert line.startswith("nm: there is no GPU for 16-mixed; bf16-mixed runs instead")
    start = "nm: 270 K parameters, 19 BatchNorm2d, bf16-mixed, cpu → runs/cifar_l2/version_0"
    assert answer.out[0] == start
    assert " run         runs/cifar_l2/version_0" in answer.out


@pytest.mark.parametrize(
    ("config", "instructions", "options", "expected"),
    [
        ("quickstart", True, "", ("bf16-mixed", True, "add_relu")),
        ("cifar_l2", True, "--trainer.precision 32", (32, True, None)),
        ("quickstart", False, "", (None, False, None)),
    ],
)
def test_fast_sets_what_is_fast_on_this_cpu(
    config: str, instructions: bool, options: str, expected: Any, nm: Nm, monkeypatch: Any
) -> None:
    monkeypatch.setattr("nmlightning.commands.fit.has_bfloat16", lambda: instructions)
    words = ["--data", "Digits", *DIGITS, *options.split(), "--model.net.depth", "8"]
    answer = nm("fit", "--config", config, *words, "--model.fast", "auto")
    assert has("nm: model.fast" if instructions else "changes nothing: this CPU has", answer.err)
    chosen = yaml.safe_load(Path(f"runs/{config}/version_0/config.yaml").read_text())
    swaps = [c["init_args"].get("fuse") for c in chosen["trainer"]["callbacks"]]
    channels_last = chosen["model"]["init_args"]["channels_last"]
    assert (chosen["trainer"]["precision"], channels_last, swaps[-1]) == expected


# ---- what a run keeps ----


def test_fit_reports_and_keeps_a_run(nm: Nm) -> None:
    answer = nm(*FIT)
    assert answer.code == 0
    assert has(r" val +\d+\.\d+ +\d+\.\d\d % +\d+\.\d\d %", answer.out)
    assert has(r" 1 epoch in .* s · [\d,]+ images/s in training", answer.out)
    run = Path("runs/quickstart/version_0")
    assert {f" run         {run}", f" checkpoint  {run / LAST}"} < set(answer.out)
    assert answer.err == []
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    (events,) = run.glob("events.out.tfevents.*")
    assert b"val/top1" in events.read_bytes()
    assert b"hp_metric" not in events.read_bytes()


def test_fit_says_that_its_loss_is_no_number(nm: Nm) -> None:
    answer = nm(*FIT, "--model.optimizer.lr", "1e30")
    assert answer.code == 3
    (line,) = answer.err
    assert re.match("nm: (val|train)/loss is (nan|inf) at the end: the weights are of no use", line)
    checkpoint = next(Path("runs").rglob("*.ckpt"))
    assert nm("test", "--config", "quickstart", *DIGITS, "--ckpt_path", str(checkpoint)).code == 3


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=false"], ["--trainer.logger=CSVLogger"]])
def test_fit_overwrites_no_earlier_run(nm: Nm, logger: list[str]) -> None:
    for _ in range(2):
        assert nm(*FIT, *logger).code == 0
        first = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/version_0/**/*")}
    versions = sorted(Path("runs/quickstart").iterdir())
    assert [path.name for path in versions] == ["version_0", "version_1"]
    assert all((path / LAST).is_file() and (path / "config.yaml").is_file() for path in versions)
    assert max(first.values()) < (versions[1] / "config.yaml").stat().st_mtime_ns
    assert (versions[1] / "metrics.csv").exists() == ("CSV" in str(logger))
    assert bool([*versions[1].glob("events*")]) == (not logger)


def test_fit_refuses_a_folder_that_holds_a_run(nm: Nm) -> None:
    again = [*FIT, "--trainer.logger.version", "7"]
    assert nm(*again).code == 0
    before = (Path("runs/quickstart/version_7") / LAST).stat().st_mtime_ns
    answer = nm(*again)
    assert answer.code == 2
    (line,) = answer.err
    assert line.startswith("nm: runs/quickstart/version_7 holds another run")
    assert (Path("runs/quickstart/version_7") / LAST).stat().st_mtime_ns == before


@pytest.mark.parametrize(("command", "row"), [("validate", "val"), ("test", "test")])
def test_evaluation_prints_and_keeps_nothing(nm: Nm, trained: Path, command: str, row: str) -> None:
    config, last = str(trained / "config.yaml"), str(trained / LAST)
    answer = nm(command, "--config", config, "--ckpt_path", last)
    assert answer.code == 0
    assert has(rf" {row} +\d+\.\d+ +\d+\.\d\d %", answer.out)
    assert f" checkpoint  {last}" in answer.out
    assert not Path("runs").exists()


def test_predict_notices_a_missing_writer(nm: Nm, trained: Path) -> None:
    config, last = str(trained / "config.yaml"), str(trained / LAST)
    answer = nm("predict", "--config", config, "--ckpt_path", last)
    assert answer.code == 0
    assert has("nm: nothing is kept: add a BasePredictionWriter", answer.err)


@pytest.mark.parametrize("address", ["http://localhost:9", "local://"])
def test_checkpoints_from_an_address_hold_no_objects(
    nm: Nm, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    torch.save({"object": Path()}, "a.ckpt")
    content = io.BytesIO(Path("a.ckpt").read_bytes())
    monkeypatch.setattr("nmlightning.callbacks.checkpoints.urlopen", lambda _: content)
    path = f"{address}{Path('a.ckpt').absolute()}"
    answer = nm("test", "--config", "quickstart", *DIGITS, "--ckpt_path", path)
    assert answer.err[-1:] == [f"nm: {path} holds objects, which are not loaded from there."]


# ---- resuming ----


def saved_config(run: str) -> Any:
    return yaml.safe_load((Path(run) / "config.yaml").read_text())


@pytest.mark.parametrize("given", [None, 0.5])
def test_checkpoint_hparams_fill_in_options(nm: Nm, trained: Path, given: float | None) -> None:
    resume = ["--trainer.max_epochs=2", "--ckpt_path", str(trained / LAST)]
    answer = nm(*FIT, *resume, *([f"--model.label_smoothing={given}"] if given else []))
    assert answer.code == 0
    assert has(" 1 epoch after 1 of an earlier run in ", answer.out)
    model = saved_config("runs/quickstart/version_0")["model"]
    assert model["init_args"]["label_smoothing"] == (given or 0.25)


def test_ckpt_path_last_is_of_the_newest_run(nm: Nm, trained: Path) -> None:
    newest = nm(*FIT, "--ckpt_path", "last")
    assert newest.code == 0
    assert newest.err == ["nm: runs/quickstart has no checkpoint yet, so training starts anew."]
    shutil.copytree("runs/quickstart/version_0", "runs/quickstart/version_1")
    os.utime(Path("runs/quickstart/version_0") / LAST)
    resumed = nm(*FIT, "--trainer.max_epochs=2", "--ckpt_path", "last")
    assert resumed.code == 0
    assert has(" 1 epoch after 1 of an earlier run in ", resumed.out)
    assert resumed.err == [f"nm: --ckpt_path last is runs/quickstart/version_0/{LAST}"]
    assert saved_config("runs/quickstart/version_2")["ckpt_path"].endswith(f"version_0/{LAST}")


def test_fit_keeps_its_end_and_last_passes_over_damage(nm: Nm) -> None:
    kept = json.dumps({"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2}})
    words = [*FIT, "--trainer.callbacks+", kept, "--trainer.limit_train_batches", "3"]
    first = nm(*words)
    assert " checkpoint  runs/quickstart/version_0/checkpoints/last.ckpt" in first.out
    assert torch.load("runs/quickstart/version_0" / LAST, weights_only=True)["global_step"] == 3
    last = "runs/quickstart/version_0" / LAST
    last.write_bytes(last.read_bytes()[:1000])
    Path(last.parent, ".last.ckpt.0.unfinished").touch()
    answer = nm(*words, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    older = last.with_name("epoch=0-step=2.ckpt")
    passed = f"nm: {last} is damaged, and passed over."
    assert answer.err == [passed, f"nm: --ckpt_path last is {older}"]
    assert has(" runs/quickstart/version_1/checkpoints/epoch=1-step=6.ckpt", answer.out)
    assert not list(Path("runs").rglob("*.unfinished"))


def test_ckpt_path_last_of_a_run_named_by_its_config(nm: Nm, trained: Path) -> None:
    config = ["--config", str(trained / "config.yaml"), "--config", "ckpt_path: last\n"]
    answer = nm("validate", *config)
    assert answer.code == 0
    assert f" checkpoint  {trained / LAST}" in answer.out
    assert answer.err == [f"nm: --ckpt_path last is {trained / LAST}"]


def test_ckpt_path_last_without_a_checkpoint_is_refused(nm: Nm) -> None:
    line = "nm: --ckpt_path: runs/quickstart has no checkpoint yet; give the path of one."
    assert nm("test", "--config", "quickstart", "--ckpt_path", "last") == (2, [], [line])


REFUSED = {
    "--model.net.depth=32": r"depth.* 20, .* 32",
    "--model.net.num_classes=12": r"num_classes.* 10, .* 12",
    "--trainer.callbacks.norm=linf": r"norm = 'l1' on net.bn1, this run has norm = 'linf'",
    "--trainer.callbacks.options={constant: none}": r"constant.*'none'",
    "--trainer.callbacks=null": r"'l1' on net.bn1, this run has norm = 'l2'",
    "--model.optimizer.lr=0.3": r"SGD lr 0\.\d+, and .* asks for SGD lr 0.3:",
    "--seed_everything=9": r"run has seed 1, .* asks for seed 9: give the same",
    "--model.optimizer=Adam": r"has MultiStepLR and SGD, .* asks for Adam and MultiStepLR: give",
}


@pytest.mark.parametrize(("change", "expected"), REFUSED.items(), ids=str)
def test_resume_of_another_model_fails(nm: Nm, trained: Path, change: str, expected: str) -> None:
    answer = nm(*FIT, "--ckpt_path", str(trained / LAST), change)
    assert answer.code == 2
    (line,) = answer.err
    assert line.startswith("nm: ")
    assert re.search(expected, line), line
    assert not any(Path("runs").glob("*/*")), "a refused run is kept"


def test_fit_refuses_a_file_that_is_no_checkpoint(nm: Nm, trained: Path) -> None:
    Path("half.ckpt").write_bytes((trained / LAST).read_bytes()[:1000])
    answer = nm(*FIT, "--ckpt_path", "half.ckpt")
    assert answer == (2, [], ["nm: --ckpt_path: 'half.ckpt' is not a checkpoint, or is truncated."])
    torch.save({**torch.load(trained / LAST, weights_only=True), "object": Path()}, "object.ckpt")
    for command in ("test", "fit"):
        code, _, err = nm(command, *FIT[1:], "--ckpt_path", "object.ckpt")
        assert (code, len(err)) == (2, 1)
        assert re.fullmatch(
            "nm: .* holds objects such as pathlib.*Path, .*false if you trust it.", *err
        )
    content = torch.load(trained / LAST, weights_only=True)
    rest = {"callbacks", "optimizer_states", "lr_schedulers"}
    torch.save({key: content[key] for key in content.keys() - rest}, "weights.ckpt")
    (line,) = nm(*FIT, "--ckpt_path", "weights.ckpt").err
    assert line.startswith(
        "nm: the checkpoint has weights only: give one of the whole run, or start"
    )


# ---- Ctrl-C ----


@pytest.mark.usefixtures("_keep_sigint")
def test_fit_reports_ctrl_c_before_a_checkpoint(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageClassifier, "training_step", interrupt)
    answer = nm(*FIT)
    assert answer.code == 130
    assert answer.err == ["nm: interrupted; no checkpoint exists yet."]
    monkeypatch.setattr(ImageClassifier, "validation_step", interrupt)
    assert nm("validate", *FIT[1:])[::2] == (130, [UNTRAINED, "nm: interrupted."])
    monkeypatch.setattr("nmlightning.cli.RunPaths", interrupt)
    assert nm(*FIT) == (130, [], ["nm: interrupted; no checkpoint exists yet."])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fit_keeps_the_last_checkpoint_of_a_stopped_run_and_prints_how_to_resume(
    stop: signal.Signals, code: int, tmp_path: Path, nm: Nm
) -> None:
    config = tmp_path / "my run.yaml"  # the space must be quoted
    config.write_text(shipped_configs()["quickstart"].read_text())
    endless = [*DIGITS, "--trainer.max_epochs", "10000"]
    words = ["fit", "--config", str(config), *endless]
    run = tmp_path / "runs" / "my run" / "version_0"
    # Whoever runs the tests in the background hands down a SIGINT that is ignored.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{heed}; from nmlightning.cli import main; exit(main())", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for _ in range(1200):
        if (run / LAST).is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    swapped, served, before, *lines = err.splitlines()  # and no other line
    assert swapped == "NormSwap: swapped 19 BatchNorm2d → L1BatchNorm2d"
    assert served.startswith("NormSwap: 19 L1BatchNorm2d by ")
    assert before == "nm: interrupted; the last checkpoint is kept. To resume:"
    run = run.relative_to(tmp_path)
    assert lines == [
        f"nm fit --config '{run}/config.yaml' \\",
        f"  --ckpt_path '{run}/checkpoints/last.ckpt'",
    ]
    command = "".join(lines).replace("\\", "")
    epochs = torch.load(run / LAST, weights_only=True)["epoch"] + 1
    answer = nm(*shlex.split(command)[1:], f"--trainer.max_epochs={epochs + 1}")
    assert has(f" 1 epoch after {epochs} of an earlier run in ", answer.out)
    assert (run.with_name("version_1") / LAST).is_file()


def test_ckpt_path_last_follows_the_folder_of_the_logger(nm: Nm, tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "there", "name": "mine"}}
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    for words, keeper in (
        (["--trainer.logger.init_args.name", "a9"], "--trainer.logger.init_args.name"),
        (["--trainer.logger.save_dir=there"], "--trainer.logger.save_dir=there"),
        (["--config", "mine.yaml"], "trainer.logger, in there/mine,"),
    ):
        line = f"nm: --ckpt_path: 'last' looks in runs/quickstart, but {keeper} keeps this run "
        line += "elsewhere: give the path of a checkpoint."
        assert nm(*FIT, *words, "--ckpt_path", "last") == (2, [], [line])


def test_fit_refuses_a_folder_that_cannot_be_made(nm: Nm, tmp_path: Path) -> None:
    Path("runs").touch()
    code, _, err = nm(*FIT)
    assert (code, len(err)) == (2, 1)
    assert err[0].startswith("nm: the run's folder cannot be made: ")


def test_fit_on_a_full_disk_leaves_no_folder(nm: Nm, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nmlightning.callbacks.checkpoints.torch.save", fail)
    code, _, err = nm(*FIT, "--trainer.limit_train_batches", "3")
    assert (code, len(err), list(Path("runs").glob("*/*"))) == (2, 1, [])
    assert err[0].endswith("last.ckpt cannot be written: No space left on device.")


def test_fit_refuses_a_config_that_is_no_text(nm: Nm) -> None:
    Path("last.ckpt").write_bytes(b"PK\x03\x04\xfc\xdf")
    Path("control.yaml").write_text("a: \x07", encoding="utf-8")
    for name in ("last.ckpt", "control.yaml"):
        code, _, err = nm("fit", "--config", name)
        assert (code, len(err)) == (2, 1)
        assert err[0].startswith(f"nm: --config: '{name}' is not YAML")

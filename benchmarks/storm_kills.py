"""Runs that are killed at random moments and resumed, compared in bits with those that were not."""

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from storm import Trial, Verdict, make, nm, try_all, wait

from nmlightning.reports.run import find_runs, read_run
from nmlightning.weights.history import NormHistory

SECONDS = 120  # for one run
LOST_PROCESS = 75


def config_of(kind: str) -> dict[str, Any]:
    """Return the config of a run of two epochs of eight steps."""
    decay = 0.0 if kind in ("LRCorrection", "NormSchedule") else 1e-3
    sgd = make("torch.optim.SGD", lr=0.05, momentum=0.9, weight_decay=decay)
    net = make("CifarResNet", depth=8)
    config: dict[str, Any] = {
        "seed_everything": 1,
        "model": make("ImageClassifier", net=net, optimizer=sgd),
        "data": make("Digits", batch_size=16, image_size=8),
    }
    callbacks = [
        make("NormSwap", norm="l1"),
        make(
            "ModelCheckpoint", every_n_train_steps=3, filename="last", enable_version_counter=False
        ),
    ]
    trainer: dict[str, Any] = {
        **{"max_epochs": 2, "limit_train_batches": 8, "limit_val_batches": 2, "accelerator": "cpu"},
        **{"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    }
    if kind in ("tracker", "ranks"):
        callbacks.append(make("WeightNormTracker", every=1))
    elif kind == "EMA":
        callbacks.append(make("pytorch_lightning.callbacks.EMAWeightAveraging", decay=0.9))
    elif kind in ("LRCorrection", "NormSchedule"):
        rule = make(kind, reference="runs/tracker")
        callbacks.append(make("WeightNormTracker", every=1, steering=rule))
    elif kind == "CSV":
        trainer["logger"] = make(
            "CSVLogger", save_dir="runs", name="CSV", flush_logs_every_n_steps=1
        )
    elif kind == "dropout":
        sizes = {"width": 16, "hidden": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
        net = make("nmlightning.models.Transformer", vocab_size=400, dropout=0.2, **sizes)
        config["model"] = make("Translator", net=net, optimizer=make("torch.optim.Adam", lr=1e-3))
        config["data"] = make("NumberNames")
        callbacks[0] = make("NormSwap", norm="l1", kinds=["layer"])
    if kind == "ranks":
        trainer |= {"devices": 2, "strategy": "ddp"}
    return config | {"trainer": trainer | {"callbacks": callbacks}}


KINDS = ("tracker", "EMA", "LRCorrection", "NormSchedule", "CSV", "dropout", "ranks")


def start(kind: str, log: Path, *options: str) -> list[int]:
    """Start a run, and return the ids of its processes."""
    words = ("fit", "--config", f"{kind}.yaml", *options)
    if kind != "ranks":
        return [nm(*words, log=log)]
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])

    def join(rank: int) -> None:
        os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
        os.environ["WORLD_SIZE"] = "2"

    return [nm(*words, log=log, before=lambda: join(rank)) for rank in (0, 1)]  # noqa: B023


def await_folder(kind: str) -> None:
    """Wait until a run has saved its config: its processes have met by then."""
    end = time.monotonic() + SECONDS
    while not any(Path("runs", kind).glob("version_*/config.yaml")) and time.monotonic() < end:
        time.sleep(0.02)


def finish(processes: list[int]) -> list[int | None]:
    """Return the exit codes of a run's processes."""
    return [wait(process, SECONDS) for process in processes]


def try_kind(kind: str, shares: list[float]) -> str:
    """Return a line for each kill: what differs after the resume, or nothing."""
    log = Path("log").absolute()
    if kind in ("LRCorrection", "NormSchedule"):
        Path("tracker.yaml").write_text(yaml.safe_dump(config_of("tracker")))
        finish(start("tracker", log))
    Path("whole").mkdir()
    os.chdir("whole")
    if kind in ("LRCorrection", "NormSchedule"):
        os.renames("../runs/tracker", "../tracker")
    _prepare(kind)
    processes = start(kind, log)
    await_folder(kind)
    began = time.monotonic()
    codes = finish(processes)
    seconds = time.monotonic() - began
    os.chdir("..")
    if any(codes):
        return "\n".join(["the run itself exits with " + str(codes)] * len(shares))
    return "\n".join(_kill(kind, number, share * seconds) for number, share in enumerate(shares))


def _prepare(kind: str) -> None:
    """Write the config, and lay the recording that a rule follows beside it."""
    Path(f"{kind}.yaml").write_text(yaml.safe_dump(config_of(kind)))
    if kind in ("LRCorrection", "NormSchedule"):
        Path("runs").mkdir()
        Path("runs/tracker").symlink_to(Path("../tracker").resolve())


def _kill(kind: str, number: int, seconds: float) -> str:
    folder, log = Path(f"kill-{number}"), Path("log").absolute()
    folder.mkdir()
    os.chdir(folder)
    try:
        _prepare(kind)
        processes = start(kind, log)
        await_folder(kind)
        time.sleep(seconds)
        os.kill(processes[number % len(processes)], signal.SIGKILL)
        codes = finish(processes)
        others = [code for code in codes if code not in (-signal.SIGKILL, LOST_PROCESS, 0)]
        if others:
            return f"killed after {seconds:.1f} s, another process exits with {others}"
        codes = finish(start(kind, log, "--ckpt_path", "last"))
        if any(codes):
            return f"killed after {seconds:.1f} s, the resume exits with {codes}"
        difference = compare(Path("../whole/runs") / kind, Path("runs") / kind)
        return f"killed after {seconds:.1f} s: {difference}" if difference else ""
    finally:
        os.chdir("..")


def compare(whole: Path, resumed: Path) -> str:
    """Return how a resumed run differs from one that was never stopped, or ""."""
    differences = []
    a, b = (_last(folder) for folder in (whole, resumed))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        differences += _differences(a[key], b[key], key)
    for key in sorted(a["callbacks"].keys() | b["callbacks"].keys()):
        if "Checkpoint" not in key and "Tracker" not in key:  # paths, and what is compared below
            both = (x["callbacks"].get(key) for x in (a, b))
            differences += _differences(*both, key.split("{")[0])
    differences += _differences(_recording(whole), _recording(resumed), "recording")
    differences += _differences(_means(whole), _means(resumed), "logged")
    return "; ".join(differences[:4]) + f" and {len(differences) - 4} more" * (len(differences) > 4)


def _last(folder: Path) -> Any:
    file = max(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(file, weights_only=True)


def _recording(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("version_*/weight_norms.safetensors"))
    if not files:
        return {}
    history = NormHistory.load(max(files, key=lambda path: path.stat().st_mtime))
    rates = {"steps": history.steps, "epochs": history.epochs, "lr": history.learning_rates}
    return {**history.norms, **rates}


def _means(folder: Path) -> dict[str, Any]:
    """Return what was logged, by tag and step; of a step done twice the later, and no speeds."""
    found: dict[str, Any] = {}
    for run in find_runs([folder]):
        for tag, series in read_run(run).scalars.items():
            if tag.startswith(("train/", "val/")) and "_per_s" not in tag:
                pairs = zip(series.steps.tolist(), series.values.tolist(), strict=True)
                found.update({f"{tag} at {step}": value for step, value in pairs})
    return found


def _differences(a: Any, b: Any, name: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        missing = object()
        both = [(a.get(key, missing), b.get(key, missing), f"{name} {key}") for key in keys]
        return [line for pair in both for line in _differences(*pair)]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            line
            for number, (x, y) in enumerate(zip(a, b, strict=True))
            for line in _differences(x, y, f"{name} {number}")
        ]
    if isinstance(a, torch.Tensor | np.ndarray) and type(a) is type(b):
        same = a.shape == b.shape and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
        return [] if same else [name]
    return [] if a == b or (a != a and b != b) else [name]


def run(seed: int, count: int, processes: int) -> list[Verdict]:
    """Return what became of `count` kills, shared by the kinds of runs."""
    draw = random.Random(seed)
    shares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(count):
        shares[KINDS[number % len(KINDS)]].append(draw.uniform(0.0, 0.95))
    trials = [Trial(kind, lambda k=kind, s=s: try_kind(k, s)) for kind, s in shares.items() if s]
    return try_all(trials, SECONDS * 8, processes)

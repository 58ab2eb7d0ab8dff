"""Writes each kind of file where the disk is full: the earlier one must stay, and a line say so."""

import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from storm import Trial, Verdict, fork, make, try_all, wait
from storm_inputs import GOOD
from storm_kills import config_of

from nmlightning.cli import main
from nmlightning.errors import InputError
from nmlightning.kernels.cpu import build
from nmlightning.weights.history import NormHistory

SECONDS = 120


def fit() -> int:
    """Write a checkpoint, always to the same place."""
    place = {"dirpath": "kept", "filename": "last", "enable_version_counter": False}
    keep = make("ModelCheckpoint", **place)
    trainer = GOOD["trainer"] | {"enable_checkpointing": True, "callbacks": [keep]}
    Path("config.yaml").write_text(yaml.safe_dump(GOOD | {"trainer": trainer}))
    return main(["fit", "--config", "config.yaml"])


def log(logger: str) -> int:
    """Log norms of weights in a hundred steps."""
    place = make(logger, save_dir="runs", name="log")
    steps = {"max_steps": 100, "limit_train_batches": 100, "log_every_n_steps": 1}
    tracked = {"callbacks": [make("WeightNormTracker", every=1)], "logger": place}
    config = GOOD | {"trainer": GOOD["trainer"] | steps | tracked}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", "config.yaml"])


def export(form: str, file: str) -> int:
    """Export a checkpoint to a file."""
    words = ["export", "../checkpoint/kept/last.ckpt", "--format", form, "--output", file]
    return main([*words, "--overwrite", "--input_shape", "3,8,8"])


def record() -> int:
    """Write a recording."""
    try:
        NormHistory.from_arrays({"a": np.ones((100, 64))}, range(100), [0] * 100).save(
            "a.safetensors"
        )
    except InputError as error:
        print(f"nm: {error}", file=sys.stderr)
        return 2
    return 0


def compare() -> int:
    """Write a page."""
    Path("run").mkdir(exist_ok=True)
    if not Path("run/metrics.csv").exists():
        Path("run/metrics.csv").write_text("step,val/top1\n9,0.5\n19,0.75\n")
    return main(["compare", "run", "--report", "page.html"])


def make_sources() -> None:
    """Write the images that shards are made of, the sentences of a corpus, and a kernel."""
    Path("short.cc").write_text(
        "#include <torch/library.h>\nTORCH_LIBRARY(nmlightning_short, m) {}\n"
    )
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(2000)]
    lines = [" ".join(draw.choices(words, k=8)) + "\n" for _ in range(2000)]
    Path("text").write_text("".join(lines))
    for part in ("train", "val"):
        for name in "ab":
            folder = Path("images", part, name)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(0).integers(256, size=(128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0.png")


def shard() -> int:
    """Write shards, always to a new folder."""
    return main(["shard", "images", "shards"])


def cache(vocab_size: int) -> int:
    """Cache the tokenizer and the pairs of a corpus, of which one is the larger."""
    files, cached = ["text", "text"], {"root": ".", "vocab_size": vocab_size}
    data = make("ParallelText", train=files, val=files, tokens_a_batch=1000, **cached)
    Path("config.yaml").write_text(yaml.safe_dump(config_of("dropout") | {"data": data}))
    return main(["fit", "--config", "config.yaml"])


def build_kernels() -> int:
    """Compile a short source in the place of the kernels'."""
    os.environ["XDG_CACHE_HOME"] = str(Path().absolute())
    build.source_files = lambda: [Path("short.cc").absolute()]
    build.flags = lambda: ("-O0",)
    return main(["kernels", "build"])


# The file that is written, None where nothing is replaced, and what writes it.
FILES: dict[str, tuple[str | None, Callable[[], int]]] = {
    "checkpoint": ("kept/last.ckpt", fit),
    "events": (None, partial(log, "TensorBoardLogger")),
    "metrics.csv": (None, partial(log, "CSVLogger")),
    "recording": ("a.safetensors", record),
    "page": ("page.html", compare),
    "export pt": ("net.pt", partial(export, "state_dict", "net.pt")),
    "export onnx": ("net.onnx", partial(export, "onnx", "net.onnx")),
    "export torch.export": ("net.pt2", partial(export, "torch_export", "net.pt2")),
    "shards": (None, shard),
    "tokenizer": (None, partial(cache, 2000)),
    "pairs": (None, partial(cache, 270)),
    "kernels": (None, build_kernels),
}


def try_file(write: Callable[[], int], name: str | None) -> str:
    """Write a file, and again with no more room than half of it; return what is wrong."""
    if name and (code := wait(fork(write), SECONDS)):
        return f"the first one exits with {code}"
    if name is None:
        make_sources()
    good = Path(name).read_bytes() if name else b" " * 60_000
    before = {path for path in Path().rglob("*") if path.name != "log"}
    log = Path("full").absolute()

    def fill() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        room = len(good) // 2
        os.environ["TMPDIR"] = str(Path().absolute())
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return write()

    code = wait(fork(fill, log), SECONDS)
    said = log.read_text(errors="replace").strip().splitlines()
    if name and Path(name).read_bytes() != good:
        return "the earlier file is not whole"
    is_line = re.search("(?<!a file cannot be )written|too large|not compile", " ".join(said[-1:]))
    if code != 2 or not is_line or any("Traceback" in line for line in said):
        return f"exit {code}: {said[-1:]}"
    left = set(Path().rglob("*")) - before - {log, Path("full")}
    drafts = [str(path) for path in left if "unfinished" in path.name or path.name.startswith(".")]
    return f"{drafts} are left" if drafts else ""


def run() -> list[Verdict]:
    """Return what became of each kind of file."""

    def try_each() -> str:
        reasons = []
        for kind, (name, write) in FILES.items():
            Path(kind.replace(" ", "-")).mkdir()
            os.chdir(kind.replace(" ", "-"))
            reasons.append(f"{kind}: {try_file(write, name)}")
            os.chdir("..")
        return "\n".join(reasons)

    found = try_all([Trial("disk", try_each)], 8 * SECONDS)
    return [Verdict(*(part.strip() for part in x.reason.partition(": ")[::2])) for x in found]

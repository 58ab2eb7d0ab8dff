"""Generated bad inputs: configs, options, event files, recordings, kept runs and checkpoints.

Each is a good file or command with one thing wrong. It is lost if there is a traceback, no end, a
success where none can be, or another answer than that of the good one where there is a success.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from storm import Trial, Verdict, limit_memory, make, try_all
from torch.utils.tensorboard import SummaryWriter

from nmlightning.cli import main
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory

SECONDS = 20  # of computing that an answer may take
SHORT = {
    **{"max_epochs": 1, "max_steps": 1, "limit_train_batches": 1, "limit_val_batches": 1},
    **{"num_sanity_val_steps": 0, "accelerator": "cpu", "logger": False},
    **{"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False},
}
GOOD: dict[str, Any] = {
    "seed_everything": 1,
    "model": make(
        "ImageClassifier",
        net=make("CifarResNet", depth=8),
        optimizer=make("torch.optim.SGD", lr=0.1),
        lr_scheduler=make("torch.optim.lr_scheduler.StepLR", step_size=2),
    ),
    "data": make("Digits", batch_size=16, image_size=8),
    "trainer": {**SHORT, "callbacks": [make("NormSwap", norm="l1")]},
}
# Whatever comes in the place of a value: never right, whatever the key.
WRONG = (
    *(".nan", "2001-99-99", "!!set {a, b}", "!!binary abc", "!!python/object:os.system {}"),
    *("9" * 5000, "[" * 3000 + "]" * 3000, "&self [*self]", "{a: 1, a: 2}", '"a\\0b"', "*nobody"),
    *("{no_such_key: 1}", "[[], {}]", "no such thing", "{", "'"),
)
# These may be right; only a traceback or no end is wrong.
ODD = (
    *("-1", "0", "1", "null", "true", "''", "[]", "{}", "1e99", "-1e99", "1e-99", ".inf", "1.5"),
    *("1000000000000", "99999999999999999999", "0x1f", "1:30", "~", "/dev/null", ".", "x" * 300),
)
KEYS = re.compile(r"^(\s*(?:- )?[\w+]+): (\S.*)$", re.M)


class Late(BaseException):
    """An answer took too long."""


def answer(*words: str) -> tuple[int | str, str, str]:
    """Run `nm` here, and return its exit code, or what it raised, and what it printed."""
    out, err = io.StringIO(), io.StringIO()

    def stop(*_: Any) -> None:
        raise Late

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(6 * SECONDS)
    code: int | str
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
    except Late:
        code = "hangs"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        code = f"{type(error).__name__}: {str(error)[:120]!r} in {place.name} of {place.filename}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return code, out.getvalue(), err.getvalue()


def judge(words: tuple[str, ...], must_fail: bool = False, same_as: str | None = None) -> str:
    """Return why an answer of `nm` is wrong, or ""."""
    code, out, err = answer(*words)
    if isinstance(code, str):
        return code
    if code == 0 and must_fail:
        return "a wrong success"
    if code == 0 and same_as is not None and out != same_as and "damaged" not in out + err:
        return "another answer than that of the good file"
    lines = [line for line in err.splitlines() if line.startswith("nm")]
    return "" if code == 0 or lines else f"exit {code} without a line"


def change_config(draw: random.Random) -> tuple[str, bool]:
    """Return a config with one thing wrong, and whether it must be refused."""
    text = yaml.safe_dump(GOOD, sort_keys=False)
    way = draw.randrange(5)
    values = list(KEYS.finditer(text))
    if way < 2:
        found, wrong = draw.choice(values), way == 0
        value = draw.choice(WRONG if wrong else ODD)
        return text[: found.start(2)] + value + text[found.end(2) :], wrong
    if way == 2:  # a key twice
        found = draw.choice([value for value in values if "- " not in value[1]])
        return f"{text[: found.end()]}\n{found[0]}{text[found.end() :]}", True
    if way == 3:  # a key that nothing has
        found = draw.choice([value for value in values if "- " not in value[1]])
        return text.replace(found[0], found[0].replace(":", "_x:", 1), 1), True
    place = draw.randrange(len(text))  # a character
    return text[:place] + chr(draw.randrange(1, 300)) + text[place + 1 :], False


def try_config(draw: random.Random) -> str:
    """Try a config in `nm fit`, or as one that a run has saved in `nm compare`."""
    text, must_fail = change_config(draw)
    if draw.random() < 0.3:
        shutil.copytree("../good/csv", "run")
        Path("run/config.yaml").write_text(text)
        return judge(("compare", "run"))
    Path("config.yaml").write_text(text)
    return judge(("fit", "--config", "config.yaml"), must_fail)


def try_option(draw: random.Random) -> str:
    """Try a command with one option that is wrong."""
    keys = [
        *("model.net.depth", "model.net.num_classes", "model.optimizer.lr", "model.num_classes"),
        *("data.batch_size", "data.image_size", "data.channels", "trainer.devices"),
        *("trainer.precision", "trainer.gradient_clip_val", "trainer.limit_train_batches"),
        *("trainer.callbacks.norm", "trainer.strategy", "trainer.val_check_interval", "data"),
        *("model.net", "model", "trainer.callbacks", "seed_everything", "ckpt_path", "config"),
        *("trainer.accumulate_grad_batches", "trainer.max_time", "trainer.overfit_batches"),
    ]
    wrong = draw.random() < 0.5
    value = draw.choice(WRONG if wrong else ODD).replace('"a\\0b"', "a\0b")
    command = draw.choice(("fit", "fit", "fit", "compare", "export", "dashboard"))
    if command == "fit":
        words = ("fit", "--config", "../good/config.yaml", f"--{draw.choice(keys)}", value)
        return judge(words, wrong)
    option = {"compare": "--metric", "export": "--input_shape", "dashboard": "--port"}[command]
    given = "../good/last.ckpt" if command == "export" else "../good/csv"
    formats = ("--format", "state_dict") if command == "export" else ()
    value = "-5" if command == "dashboard" else value
    return judge((command, given, *formats, option, value), command == "dashboard")


def damage(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one bit, or a stretch of them, changed, cut off or put in."""
    place, way = draw.randrange(len(content)), draw.randrange(4)
    if way == 0:
        return content[:place]
    if way == 1:
        return content[:place] + draw.randbytes(draw.randrange(1, 64)) + content[place:]
    if way == 2:
        size = draw.randrange(1, 64)
        return content[:place] + draw.randbytes(size) + content[place + size :]
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def try_events(draw: random.Random) -> str:
    """Try a damaged event file in `nm compare`, beside a good run; a torn end is no damage."""
    shutil.copytree("../good/events", "events")
    shutil.copytree("../good/csv", "csv")
    (file,) = Path("events").glob("events*")
    good = file.read_bytes()
    file.write_bytes(damage(good, draw))
    torn = good.startswith(file.read_bytes())
    return judge(("compare", "events", "csv"), same_as=None if torn else _compared("events", "csv"))


def _compared(*names: str) -> str:
    return answer("compare", *(f"../good/{name}" for name in names))[1].replace("../good/", "")


def try_csv(draw: random.Random) -> str:
    """Try a damaged metrics.csv, or a kept pair with other metadata."""
    if draw.random() < 0.5:
        shutil.copytree("../good/csv", "run")
        cells = ("1e30", "9" * 40, "nan", "inf", "x", "", "-1", "0x1", "\0", '"', "9" * 5000)
        rows = [["step", "val/top1", "epoch"], ["9", "0.5", "0"], ["19", "0.75", "1"]]
        rows[draw.randrange(3)][draw.randrange(3)] = draw.choice(cells)
        Path("run/metrics.csv").write_text("\n".join(map(",".join, rows)))
        return judge(("compare", "run"))
    Path("a-1.csv").write_text("step,val/top1\n9,0.5\n")
    pair = {"settings": {"norm": "l1"}, "seed": 1, "cpu_minutes": 1.5}
    values = (None, [], {}, "x", -1, 1e300, 10**400, float("nan"), [[1]], True, {"a": {"b": [1]}})
    pair[draw.choice(list(pair))] = draw.choice(values)
    text = json.dumps(pair)
    Path("a-1.json").write_text("[" * 100_000 if draw.random() < 0.1 else text)
    return judge(("compare", "."))


def try_recording(draw: random.Random) -> str:
    """Try a damaged recording, or one whose header says something else."""
    good = Path("../good/weight_norms.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, rest = json.loads(good[8 : 8 + size]), good[8 + size :]
    if draw.random() < 0.5:
        content = damage(good, draw)
    else:
        entry = header[draw.choice([key for key in header if key != "__metadata__"])]
        metadata = header["__metadata__"]
        if draw.random() < 0.5:
            odd = (
                "BF16",
                "F8_E4M3",
                "F4",
                "F16",
                "I64",
                [1],
                [2**62, 4],
                [0],
                [-1],
                [0, 8],
                "x",
                None,
            )
            entry[draw.choice(list(entry))] = draw.choice(odd)
        else:
            odd = ("[" * 100_000, "", "null", "[1]", "{}", "9" * 5000, '"a"', "\0")
            metadata[draw.choice(list(metadata))] = draw.choice(odd)
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + rest
    Path("weight_norms.safetensors").write_bytes(content)
    try:
        loaded = NormHistory.load(".")
    except InputError:
        return ""
    good_one = NormHistory.load("../good")
    same = list(loaded.norms) == list(good_one.norms) and all(
        np.array_equal(loaded.norms[name], values) for name, values in good_one.norms.items()
    )
    is_same = same and np.array_equal(loaded.steps, good_one.steps)
    return "" if is_same else "a wrong success: other norms than those that were recorded"


def try_checkpoint(draw: random.Random) -> str:
    """Try a damaged checkpoint, or one that holds something else, in two commands."""
    good = Path("../good/last.ckpt")
    if draw.random() < 0.6:
        Path("last.ckpt").write_bytes(damage(good.read_bytes(), draw))
    else:
        content = torch.load(good, weights_only=True)
        odd = (None, 1, "x", [], {}, {"a": object}, torch.zeros(2), draw, float("nan"))
        content[draw.choice(list(content))] = draw.choice(odd)
        torch.save(content, "last.ckpt")
    fit = ("test", "--config", "../good/config.yaml", "--trainer.limit_test_batches", "1")
    words = (*fit, "--ckpt_path", "last.ckpt")
    if draw.random() < 0.5:
        words = ("export", "last.ckpt", "--format", "state_dict", "--input_shape", "3,8,8")
    return judge(words)


TRIALS: dict[Callable[[random.Random], str], int] = {
    **{try_config: 5, try_option: 4, try_events: 3},
    **{try_csv: 3, try_recording: 4, try_checkpoint: 3},
}


def make_good() -> None:
    """Write the good files into `good`."""
    folder = Path("good")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(GOOD, sort_keys=False))
    with SummaryWriter(str(folder / "events")) as writer:
        for epoch, value in enumerate((0.5, 0.75)):
            writer.add_scalar("val/top1", value, 10 * epoch + 9, walltime=1000.0 + epoch)
            writer.add_scalar("epoch", epoch, 10 * epoch + 9, walltime=1000.0 + epoch)
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("step,val/top1,epoch\n9,0.5,0\n19,0.75,1\n")
    norms = np.arange(1.0, 9.0).reshape(2, 4)
    NormHistory.from_arrays({"a": norms, "b": norms + 1}, [10, 20], [0, 1]).save(
        folder / "weight_norms.safetensors"
    )
    checkpointing = ("--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "kept")
    code, _, err = answer("fit", "--config", "good/config.yaml", *checkpointing)
    if code != 0:
        raise RuntimeError(f"the good config: {code}: {err}")
    shutil.copy(next(Path("kept").rglob("*.ckpt")), folder / "last.ckpt")


def run(seed: int, count: int, processes: int) -> list[Verdict]:
    """Return what became of `count` inputs, shared by the processes."""
    names = [f"{seed}-{number}" for number in range(count)]
    shares = [names[n::processes] for n in range(processes)]
    trials = [Trial("inputs", lambda x=share: "\n".join(_try_each(x))) for share in shares]
    found = try_all(trials, 600.0, processes)
    return [Verdict(*verdict.reason.partition(" ")[::2]) for verdict in found]


def _try_each(names: list[str]) -> Iterator[str]:
    limit_memory()
    make_good()
    kinds, weights = list(TRIALS), list(TRIALS.values())
    for name in names:
        draw = random.Random(name)
        Path(name).mkdir()
        os.chdir(name)
        kind = draw.choices(kinds, weights)[0]
        try:
            reason = kind(draw)
        except Exception as error:
            reason = repr(error)
        os.chdir("..")
        yield f"{kind.__name__}-{name} {' '.join(reason.split())}"

"""Take the pictures of this documentation anew, but for those of long runs; `make pictures`.

    python docs/take_pictures.py [NAME]… [--data-root DIR]

What each is made from is printed. The short runs are made first; the screens need Chromium.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).parent.resolve()
PICTURES = HERE / "pictures"
READING_TIME = 20  # s; TensorBoard does not say when it has read all of a run
BROWSER = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
COLOURS = 256  # that are kept of a picture
SIZES = {
    "custom_scalars": (1500, 1750),
    "compare": (1200, 1570),
}
RULES = ("wd_on", "wd_off", "lr_correction", "norm_schedule", "exponential_lr")
DIGITS = ["--data", "Digits", "--data.batch_size", "64", "--model.net.width", "8"]
DIGITS += ["--trainer.limit_train_batches", "10", "--trainer.log_every_n_steps", "2"]


def take_compare(folder: Path, _: str | None) -> None:
    """compare: the kept runs of results/weight_decay."""
    nm(folder, "compare", HERE.parent / "results" / "weight_decay", "--report", "comparison.html")
    take("compare", (folder / "comparison.html").as_uri())


def take_screens(folder: Path, _: str | None) -> None:
    """custom_scalars: five runs of configs/study_short_* on digits."""
    for rule in RULES:
        nm(folder, "fit", "--config", f"study_short_{rule}", *DIGITS)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nmlightning", "dashboard", "runs", "--port", str(port)]
    dashboard = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        wait_for(f"http://localhost:{port}/data/plugin/scalars/tags")
        time.sleep(READING_TIME)
        take("custom_scalars", f"http://localhost:{port}/#custom_scalars")
    finally:
        dashboard.terminate()


def draw_ranges(folder: Path, _: str | None) -> None:
    """norm_ranges: configs/quickstart.yaml by L2 for an epoch, its convolutions then scaled.

    What nm probe prints of it is in half_precision.md.
    """
    options = ["--config", "quickstart", "--trainer.max_epochs", "1", "--trainer.callbacks", "[]"]
    nm(folder, "fit", *options)
    (file,) = (folder / "runs").rglob("last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    convolutions = [w for w in checkpoint["state_dict"].values() if w.dim() == 4]
    for number, weight in enumerate(convolutions):
        weight *= 10 ** (-3 + 6.3 * number / (len(convolutions) - 1))
    torch.save(checkpoint, file)
    run(["-m", "nmlightning", "probe", file, "--picture", "norm_ranges.svg"], cwd=folder)
    shutil.copy(folder / "norm_ranges.svg", PICTURES)


def draw_concepts(*_: object) -> None:
    """concept_*, overview: docs/draw_concepts.py."""
    run([HERE / "draw_concepts.py"])


def draw_control(*_: object) -> None:
    """norm_control_*: docs/draw_norm_control.py."""
    run([HERE / "draw_norm_control.py"])


def draw_results(*_: object) -> None:
    """results_*, recordings_*: results/make_tables.py from results/, with their pages."""
    run([HERE.parent / "results" / "make_tables.py"])


def draw_half(_: object, data_root: str | None) -> None:
    """half_precision: benchmarks/half_precision.py, twelve runs on CIFAR-10, with --data-root."""
    if data_root is None:
        print("    left as it is: there is no --data-root")
        return
    script = HERE.parent / "benchmarks" / "half_precision.py"
    run([script, "--data-root", data_root, "--picture", PICTURES / "half_precision.svg"])


TAKEN: dict[str, Callable[[Path, str | None], None]] = {
    "compare": take_compare,
    "screens": take_screens,
    "ranges": draw_ranges,
    "concepts": draw_concepts,
    "control": draw_control,
    "results": draw_results,
    "half": draw_half,
}


def main() -> None:
    """Take those that are asked for, or else all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(TAKEN)} (default: all)")
    parser.add_argument("--data-root", type=os.path.abspath, help="holds CIFAR-10")
    options = parser.parse_args()
    for name in options.name or TAKEN:
        print(TAKEN[name].__doc__, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            TAKEN[name](Path(folder), options.data_root)


def nm(folder: Path, *words: str | Path) -> None:
    run(["-m", "nmlightning", *words], cwd=folder, stdout=subprocess.DEVNULL)


def run(words: Sequence[str | Path], **options: object) -> None:
    """Run a command of this Python."""
    subprocess.run([sys.executable, *words], check=True, **options)  # type: ignore[call-overload]


def take(name: str, address: str) -> None:
    """Write the picture of a page, once its scripts have had time."""
    width, height = SIZES[name]
    file = PICTURES / f"{name}.png"
    size, shot = f"--window-size={width},{height}", f"--screenshot={file}"
    command = [*BROWSER, size, shot, "--virtual-time-budget=30000", address]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with Image.open(file) as picture:
        picture.quantize(COLOURS).save(file, optimize=True)


def wait_for(address: str, seconds: float = 60) -> None:
    """Return once TensorBoard has read something, or raise TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address) as answer:
                if len(answer.read()) > len(b"{}"):
                    return
        except OSError:
            pass
        time.sleep(1)
    raise TimeoutError(f"TensorBoard shows nothing at {address} after {seconds:g} s.")


if __name__ == "__main__":
    main()

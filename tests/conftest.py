"""A fixed seed for every test, the real data where it is at hand, and made runs and images."""

import os
import readline  # noqa: F401  # puts the terminal's width into the environment of processes
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from built_kernels import load_kernels
from nmlightning.kernels import norm_backend
from nmlightning.weights.history import NormHistory
from nmlightning.weights.recording_file import FILE_NAME

os.environ.pop("COLUMNS", None)  # a pipe, of any width
os.unsetenv("COLUMNS")  # as readline set it, behind os.environ
os.environ["CI"] = "true"  # nm fit builds no kernels in the background


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-root", default="data", help="the folder with the real data sets")


@pytest.fixture(scope="session")
def data_root(request: pytest.FixtureRequest) -> Path:
    """The folder with the real data sets; a test that asks for it is marked `real_data`."""
    return Path(request.config.getoption("--data-root")).resolve()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(config.getoption("--data-root"))
    for item in items:
        if marker := item.get_closest_marker("real_data"):
            folder = root.joinpath(*marker.args or ("cifar-10-batches-py",))
            reason = f"{folder} is not there; say where the data is by --data-root"
            item.add_marker(pytest.mark.skipif(not folder.is_dir(), reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _formula() -> Iterator[None]:
    """Compute norms by the formula, whether the kernels are built or not."""
    with norm_backend("formula"):
        yield


@pytest.fixture(params=["formula", "auto"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute norms by the formula, and once more by the kernels where they serve."""
    if request.param == "auto":
        load_kernels()
    with norm_backend(request.param):
        yield


@pytest.fixture
def _kernels() -> Iterator[None]:
    """Compute norms by the kernels in C++ where they serve, on as many threads as a test sets."""
    load_kernels()
    threads = torch.get_num_threads()
    with norm_backend("auto"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def _keep_sigint() -> Iterator[None]:
    """Lightning ignores SIGINT once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run's folder: its accuracy after each epoch of ten steps, its config, its norms."""

    def make(
        name: str = "experiment/version_0",
        accuracy: list[float] = [0.5, 0.75],  # noqa: B006
        config: Mapping[str, Any] | None = None,
        norms: Mapping[str, Any] | None = None,
        scalars: Mapping[str, list[float]] | None = None,
        first_epoch: int = 0,
    ) -> Path:
        folder = tmp_path / name
        with SummaryWriter(str(folder)) as writer:
            for epoch, value in enumerate(accuracy, first_epoch):
                step = 10 * epoch + 9
                writer.add_scalar("val/top1", value, step, walltime=1000.0 + 30 * epoch)
                writer.add_scalar("epoch", epoch, step, walltime=1000.0 + 30 * epoch)
            for tag, values in (scalars or {}).items():
                for step, value in enumerate(values):
                    writer.add_scalar(tag, value, step, walltime=1000.0)
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
        if norms is not None:
            records = len(next(iter(norms.values())))
            history = NormHistory.from_arrays(
                norms, 10 * np.arange(records), np.arange(records).clip(1) - 1
            )
            history.save(folder / FILE_NAME)
        return folder

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Write train and val with JPEGs of three classes, as ImageNet is laid out: 50 by 40 pixels."""
    draw = np.random.default_rng(0)
    for part, length in (("train", 4), ("val", 2)):
        for name in "abc":
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(length):
                pixels = draw.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    return tmp_path / "images"


@pytest.fixture
def _forks() -> None:
    """Skip a test whose ranks are forked from this process, where they cannot be."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked, and this system cannot")
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, so that DTensors can be made."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def nm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run `nm` in an empty folder and return what it answers."""
    from nmlightning.cli import main
    from nmlightning.commands.failures import filtered_handlers
    from quickstart_runs import Answer

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # a pipe, of any width

    def run(*words: object) -> Any:
        for handler in filtered_handlers():
            monkeypatch.setattr(handler, "stream", sys.stderr)  # not that of another test
        code = main([*map(str, words)])
        out, err = capfd.readouterr()
        # Under pytest, Lightning's loggers end elsewhere; the test with a real Ctrl-C sees all.
        lines = [line for line in err.splitlines() if "NormSwap: " not in line]
        return Answer(code, out.splitlines(), lines)

    return run

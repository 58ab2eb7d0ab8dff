"""Triton's kernels where there is no GPU: who is served, how work is divided, what is computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nmlightning.functional.statistics import LargestMean, PowerMean, RangeMean
from nmlightning.kernels import DispatchKey, norm_backend, select_backend
from nmlightning.kernels.triton import backend, tiles

TESTS = Path(__file__).parent
SERVED = DispatchKey("batch", PowerMean(1.0), "cuda", torch.float16, torch.float32, "NHWC")
needs_triton = pytest.mark.skipif(not backend.has_triton(), reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(300)
def test_interpreted_kernels_keep_the_contract() -> None:
    """In a process of its own, since Triton must be imported with the interpreter switched on."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    result = subprocess.run(
        [*command, str(TESTS / "../support/interpreted_triton.py")],
        cwd=TESTS.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"statistic": LargestMean(1), "layout": "NCHW", "dtype": torch.bfloat16}, ""),
        ({"statistic": LargestMean(64), "dtype": torch.float32}, ""),
        ({"statistic": LargestMean(65)}, "no kernel for k above 64"),
        ({"statistic": RangeMean(16)}, "no kernel for the range"),
        ({"dtype": torch.float64}, "no kernel for float64"),
        ({"kind": "rms", "layout": "NCHW"}, ""),
        ({"kind": "layer", "layout": "NCHW", "statistic": PowerMean(3.0)}, "no kernel for"),
    ],
    ids=str,
)
def test_unsupported_reason_names_the_limit(change: dict[str, object], reason: str) -> None:
    reason_given = backend.TritonBackend().unsupported_reason(SERVED._replace(**change))
    assert reason_given.startswith(reason)
    assert bool(reason_given) == bool(reason)


def test_backend_without_triton_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    case = SERVED._replace(stats_dtype=torch.float32, dtype=torch.float32)
    assert backend.TritonBackend().unsupported_reason(case) == "triton is not installed"
    assert backend.TritonBackend().tracking() is None


def test_backend_rejects_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in backend.TritonBackend().unsupported_reason(SERVED)


@needs_triton
def test_select_backend_names_triton() -> None:
    with norm_backend("auto"):
        assert select_backend(SERVED).backend == "Triton"


def test_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nmlightning.kernels as kernels\n"
        "from nmlightning.functional.statistics import PowerMean\n"
        "key = ('batch', PowerMean(1.0), 'cuda', torch.half, torch.float32, 'NCHW')\n"
        "print(kernels.select_backend(kernels.DispatchKey(*key)).reason)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, cwd=TESTS.parents[1], capture_output=True)
    assert result.stdout.decode().strip() == "triton is not installed"


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels", "spatial"),
    [(2, 1, 1), (131_072, 16, 1024), (12_544, 2048, 49), (49, 3, 49), (3_211_264, 64, 12_544)],
)
def test_partition_covers_a_channel_once(
    rows: int, channels: int, spatial: int, channels_last: bool, item: int, processors: int
) -> None:
    shape = (rows, channels, spatial, channels_last or spatial == 1, item)
    for parts in (
        *(tiles._divide(*shape, streams, processors) for streams in (1, 2, 3)),
        tiles._divide_to_select(*shape),
    ):
        assert parts.blocks * parts.span >= rows > (parts.blocks - 1) * parts.span
        assert parts.height & (parts.height - 1) == parts.width & (parts.width - 1) == 0
        assert parts.height * parts.width * item <= max(tiles.TILE_BYTES, 32 * 128)
        assert (channels if parts.channels_last else spatial) % parts.vector == 0


@pytest.mark.parametrize(
    ("rows", "channels", "spatial", "last", "blocks"),
    [
        (8192, 64, 64, True, range(16, 33)),  # (128, 64, 8, 8)
        (32_768, 32, 256, True, range(16, 33)),
        (8192, 64, 64, False, [1]),
        (2048, 16, 64, True, [1]),
        (32, 16, 16, True, [1]),
    ],
)
def test_a_small_tensor_is_for_few_programs(
    rows: int, channels: int, spatial: int, last: bool, blocks: object
) -> None:
    for streams in (1, 2, 3):
        assert tiles._divide(rows, channels, spatial, last, 2, streams, 132).blocks in blocks


@pytest.mark.parametrize("channels_last", [False, True])
def test_partition_of_a_large_tensor_fills_the_processors(channels_last: bool) -> None:
    parts = tiles._divide(256 * 112 * 112, 64, 112 * 112, channels_last, 2, 1, 132)
    programs = parts.grid[0] * parts.grid[1]
    assert 0.9 * 264 <= programs <= 264

"""Triton's kernels compiled for GPUs that are not there: wide accesses, no spilled registers.

The kernels are those that the package launches, with its very arguments, but for the launch.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from nmlightning.functional.statistics import LargestMean, PowerMean  # noqa: E402
from nmlightning.kernels.interface import NormSpec  # noqa: E402
from nmlightning.kernels.triton import layer_norm, tiles, weights  # noqa: E402
from nmlightning.kernels.triton.batch_norm import TritonBatchNorm  # noqa: E402
from nmlightning.kernels.triton.layer_norm import TritonLayerNorm  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PROCESSORS = 132
L1, LINF, TOP10 = PowerMean(1.0), LargestMean(1), LargestMean(10)
REGISTERS = 65_536  # of a multiprocessor
SHARED = 49_152  # bytes of a program; two are to fit beside a cache of the first level

pytestmark = [
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton is not for NVIDIA"),
    # Triton reads its cache without closing it.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


class Compiled(NamedTuple):
    """A kernel's name, its PTX, its threads, and what a multiprocessor is to give each of them."""

    name: str
    ptx: str
    threads: int
    shared: int
    registers: int
    stack: int


class _NoGPU:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # for each, Triton keeps what it has compiled

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def compile_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[int, Callable[[], object]], list[Compiled]]:
    """Return what compiles all that a function launches, instead of launching it."""
    found: list[Any] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for module in (tiles, layer_norm):
        monkeypatch.setattr(module, "processors_of", lambda device: PROCESSORS)

    def compile_instead(self: Any, grid: Any) -> Callable[..., None]:
        def warm_up(*arguments: Any, **options: Any) -> None:
            found.append((self.__name__, self.warmup(*arguments, grid=grid, **options)))

        return warm_up

    monkeypatch.setattr(JITFunction, "__getitem__", compile_instead)

    def compile_for(capability: int, launch: Callable[[], object]) -> list[Compiled]:
        monkeypatch.setattr(triton.runtime.driver, "_active", _NoGPU(capability))
        launch()
        return [_read(name, kernel, tmp_path) for name, kernel in found]

    return compile_for


def _read(name: str, kernel: Any, folder: Path) -> Compiled:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    threads, shared = 32 * kernel.metadata.num_warps, kernel.metadata.shared
    return Compiled(name, kernel.asm["ptx"], threads, shared, registers, stack + local)


def _batch_norm(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, spec: NormSpec
) -> Callable[[], object]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def launch() -> None:
        x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
        residual = x if spec.fused == "add_relu" else None
        channel = torch.zeros(shape[1])
        kernels = TritonBatchNorm()
        running = channel, channel, torch.tensor(0), 0.1
        saved = kernels.forward(x, residual, channel, channel, spec, running).saved
        kernels.backward(x, saved, spec)

    return launch


def _layer_norm(features: int, dtype: torch.dtype) -> Callable[[], object]:
    def launch() -> None:
        x = torch.zeros(512, features, dtype=dtype, requires_grad=True)
        weight = torch.zeros(features, requires_grad=True)
        y: Any = TritonLayerNorm.apply(x, weight, weight, 1, 1.0, 1e-5, True)
        y.backward(x.detach())

    return launch


def _check(kernels: list[Compiled], programs: float = 2, spilled: int = 0) -> None:
    for kernel in kernels:
        assert kernel.stack <= spilled, f"{kernel.name} spills {kernel.stack} bytes"
        assert kernel.registers * kernel.threads * programs <= REGISTERS, kernel
        assert kernel.shared <= SHARED, kernel
        assert "atom." not in kernel.ptx, kernel.name
        assert not re.search(r"\bred\.global", kernel.ptx), kernel.name
        # The selection reads single elements of blocks that lie anywhere.
        if kernel.name not in ("select_largest", "track_kernel"):
            wide = r"ld\.global[.\w:]*\.(v4\.b32|v2\.b64|v8\.b16)|cp\.async\.cg"
            assert re.search(wide, kernel.ptx), kernel
        if kernel.name.startswith("write") or kernel.name == "normalise_rows":
            assert re.search(r"st\.global[.\w:]*\.(v4\.b32|v2\.b64|v8\.b16)", kernel.ptx), kernel


L1_KERNELS = ["sum_differences", "sum_sizes", "write_l1_output"]
TOP_K_KERNELS = ["find_extremes", "select_largest", "write_output"]
BACKWARD = ["sum_gradients", "write_whole_gradient"]


@pytest.mark.parametrize(("statistic", "fused"), [(L1, "relu"), (L1, None), (LINF, None)])
def test_layers_of_the_targets_compile(statistic: Any, fused: Any, compile_ahead: Any) -> None:
    spec = NormSpec(statistic, 1.25, 1e-5, fused)
    kernels = compile_ahead(90, _batch_norm((256, 64, 112, 112), True, torch.bfloat16, spec))
    forward = L1_KERNELS if statistic is L1 else TOP_K_KERNELS
    assert [kernel.name for kernel in kernels] == [*forward, *BACKWARD]
    # Triton 3.6 takes 145 registers where 3.9 takes 128: an eighth is left for others.
    _check(kernels, programs=2.25)
    pipelined = [kernel.name for kernel in kernels if "cp.async" in kernel.ptx]
    assert pipelined == [name for name in (*forward, *BACKWARD) if name != "select_largest"]


@pytest.mark.parametrize("fused", ["relu", "add_relu"])
def test_one_launch_each_way_compiles(fused: Any, compile_ahead: Any) -> None:
    spec = NormSpec(L1, 1.25, 1e-5, fused)
    kernels = compile_ahead(90, _batch_norm((128, 64, 8, 8), False, torch.float16, spec))
    assert [kernel.name for kernel in kernels] == ["write_l1_output", "write_whole_gradient"]
    _check(kernels, spilled=8)  # one value in one of them


def test_layer_norm_compiles(compile_ahead: Any) -> None:
    kernels = compile_ahead(90, _layer_norm(1024, torch.bfloat16))
    names = [kernel.name for kernel in kernels]
    assert names == ["normalise_rows", "write_row_gradients", "fold_parts"]
    _check(kernels)


def test_kernels_of_weights_compile(compile_ahead: Any) -> None:
    def launch() -> None:
        v = torch.zeros(64, 64, 3, 3, requires_grad=True)
        (w,) = weights.normalise_weights([v], [torch.ones(64)], [2.0])
        w.sum().backward()

    kernels = compile_ahead(90, launch)
    assert [kernel.name for kernel in kernels] == ["normalise_rows", "write_row_gradients"]
    assert not any(kernel.stack for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "fused"),
    [
        *((90, d, f) for d in (torch.float32, torch.bfloat16) for f in (None, "relu", "add_relu")),
        (90, torch.float16, "relu"),
        (80, torch.bfloat16, "relu"),
        (80, torch.float32, "add_relu"),
    ],
)
@pytest.mark.parametrize("statistic", [L1, TOP10], ids=["l1", "top10"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_batch_norm_compiles(
    channels_last: bool, statistic: Any, capability: int, dtype: torch.dtype, fused: Any,
    compile_ahead: Any,
) -> None:  # fmt: skip
    spec = NormSpec(statistic, 1.25, 1e-5, fused)
    kernels = compile_ahead(capability, _batch_norm((32, 64, 56, 56), channels_last, dtype, spec))
    forward = L1_KERNELS if statistic is L1 else TOP_K_KERNELS
    assert [kernel.name for kernel in kernels] == [*forward, *BACKWARD]
    # In some ptxas reserves 8 bytes of stack, which no instruction reads or writes.
    _check(kernels, spilled=8)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("features", [64, 768, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_norm_compiles(
    dtype: torch.dtype, features: int, capability: int, compile_ahead: Any
) -> None:
    _check(compile_ahead(capability, _layer_norm(features, dtype)), programs=1)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("statistic", [L1, TOP10], ids=["l1", "top10"])
def test_wide_offsets_compile(
    statistic: Any, channels_last: bool, compile_ahead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WIDE_FROM", 1)
    spec = NormSpec(statistic, 1.25, 1e-5, "relu")
    _check(compile_ahead(90, _batch_norm((8, 64, 28, 28), channels_last, torch.bfloat16, spec)))

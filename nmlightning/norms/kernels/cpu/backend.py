"""Which cases the CPU's kernels serve, and the kernels of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nmlightning.norms.kernels.cpu.batch_norm import CpuBatchNorm
from nmlightning.norms.kernels.cpu.layer_norm import CpuLayerNorm
from nmlightning.norms.kernels.cpu.library import (
    cache_folder,
    is_loaded,
    is_whole,
    library_path,
    load_library,
)
from nmlightning.norms.kernels.job import is_l1, is_largest
from nmlightning.norms.statistics import PowerMean, Statistic

if TYPE_CHECKING:
    from nmlightning.norms.kernels.dispatch import Case

NOT_BUILT = "the kernels are not built: nm kernels build"
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class CpuBackend:
    """The kernels in C++. Their library is loaded when it is first asked for, never built.

    Args:
        folder: where the built library lies.
    """

    folder: Path = field(default_factory=cache_folder)
    name = "C++"
    device = "cpu"

    def refusal(self, case: "Case") -> str:
        """Return why they do not serve the case, in a few words; nothing if they do."""
        batch = case.kind == "batch"
        if not (is_l1(case.statistic) or (batch and is_largest(case.statistic))):
            return f"no kernel for {_describe(case.statistic)}"
        if case.dtype not in _DTYPES:
            return f"no kernel for {_name(case.dtype)}"
        if case.stats_dtype != torch.float32:
            return f"no kernel for statistics in {_name(case.stats_dtype)}"
        if case.layout not in (("NCHW", "NHWC") if batch else ("NCHW",)):
            return "no kernel for elements in this order"
        return self._missing()

    def kernels(self, case: "Case") -> Any:
        """Return the kernels of a case that is served."""
        return CpuBatchNorm() if case.kind == "batch" else CpuLayerNorm(case.kind == "layer")

    def tracking(self) -> Callable[..., None] | None:
        """Return what moves running statistics, or None where it is not built."""
        return None if self._missing() else torch.ops.nmlightning.track

    def _missing(self) -> str:
        if is_loaded():
            return ""
        path = library_path(self.folder)
        if not path.exists():
            return NOT_BUILT
        if not is_whole(path):
            return f"the kernels in {path} are damaged: nm kernels build"
        try:
            load_library(path)
        except OSError:
            return f"the kernels in {path} do not load: nm kernels remove"
        return ""


def _describe(statistic: Statistic) -> str:
    if isinstance(statistic, PowerMean):
        return f"p = {statistic.p:g}"
    return "the largest values" if is_largest(statistic) else "the range"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

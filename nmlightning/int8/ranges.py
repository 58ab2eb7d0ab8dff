"""The running range of a module's inputs: buffers of the module, and the grid that they give."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nmlightning.int8.quantizer import Grid, make_grid, sample_mean
from nmlightning.name_patterns import plain_name

RANGES = ("running_min", "running_max")
QUANTIZER = "int8_quantizer"  # the attribute of a quantised norm that holds its hooks
NOTE = "nmlightning_int8"
"""What the metadata of a state dict say of a module in int8 under: its options."""
_COUNT = "num_ranges_tracked"


def register_range(module: nn.Module) -> None:
    """Add `running_min`, `running_max` and `num_ranges_tracked`, on the parameters' device."""
    device = next((q.device for q in module.parameters(recurse=False)), None)
    for name in RANGES:
        module.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device))
    module.register_buffer(_COUNT, torch.zeros((), dtype=torch.int64, device=device))


def remove_range(module: nn.Module) -> None:
    """Remove what `register_range` added."""
    for name in (*RANGES, _COUNT):
        delattr(module, name)


def clear_range(module: nn.Module) -> None:
    """Forget what was tracked; torch's constructors reset a layer before it has a range."""
    for name in (*RANGES, _COUNT):
        if name in module._buffers:
            getattr(module, name).zero_()


@contextmanager
def kept_wide(module: nn.Module) -> Iterator[None]:
    """Keep the running range of a module in float32, whatever casts the module inside."""
    before = {name: getattr(module, name) for name in RANGES}
    yield
    for name, wide in before.items():
        if (after := getattr(module, name)).dtype != wide.dtype:  # never of to_empty
            setattr(module, name, wide.to(after.device))


def this_rank() -> int:
    """Return the rank of this process, 0 without distribution."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks_to_share_with(module: nn.Module, sync: bool) -> ProcessGroup | None:
    """Return the ranks of a module that trains with `sync`, or None."""
    if not (sync and module.training and dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if dist.get_world_size() > 1 else None


@torch.no_grad()
def input_grid(
    module: nn.Module, x: Tensor, bits: int, momentum: float | None, group: ProcessGroup | None
) -> Grid:
    """Return the grid of the batch's range, which is tracked; in evaluation of the running one."""
    low, high = sample_mean(x.detach(), group)
    running = [getattr(module, name) for name in RANGES]
    if not module.training:
        known, poison = getattr(module, _COUNT) > 0, (low - low) + (high - high)  # NaN or 0
        low, high = (
            torch.where(known, kept.to(own.dtype), own) + poison
            for kept, own in zip(running, (low, high), strict=True)
        )
    elif x.numel():
        finite = (low > -torch.inf) & (high < torch.inf)
        count = getattr(module, _COUNT).add_(finite)
        newest = 1 / count if momentum is None else torch.where(count == 1, 1.0, momentum)
        for kept, own in zip(running, (low, high), strict=True):
            kept.copy_(torch.where(finite, kept + newest * (own - kept), kept))
    return make_grid(low, high, bits)


def holder_of(module: nn.Module) -> Any:
    """Return what holds the options of a layer in int8, or of a quantised norm; None of others."""
    holder = vars(module).get(QUANTIZER, module)
    return holder if hasattr(holder, "int8_options") else None


def options_of(module: nn.Module) -> dict[str, Any]:
    """Return the options of a layer in int8, or of a quantised norm; empty of any other module."""
    holder = holder_of(module)
    return {} if holder is None else holder.int8_options()


def describe_int8(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return, as plain data, the options of what computes in int8, by its name.

    Those of a norm also say what `swap_int8` made of it, if it was torch's own.
    """
    modules = model.named_modules(remove_duplicate=False)
    found = {plain_name(name): options_of(module) for name, module in modules}
    return {name: options for name, options in found.items() if options}

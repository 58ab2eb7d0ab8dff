"""Tensors that are spread over ranks as DTensors, and plain ones, under the same calls."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, without importing what makes them."""
    return type(tensor).__name__ == "DTensor"


def is_flat(tensor: Tensor) -> bool:
    """Return whether FSDP1 put several parameters, flattened, into it."""
    return bool(getattr(tensor, "_is_flat_param", False))


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of it, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def join_shards(
    values: Tensor, parameters: Sequence[Tensor], operation: Literal["sum", "max"]
) -> Tensor:
    """Return (N,) values of N parameters, joined over the ranks that hold parts of each.

    Every rank has to call it. Of a parameter that each rank holds whole the value stays as it is.
    """
    joined, places = values.clone(), dict[tuple[Any, Any], list[int]]()
    for number, parameter in enumerate(parameters):
        if is_sharded(parameter):
            place = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            places.setdefault(place, []).append(number)
    for (mesh, placements), numbers in places.items():
        joined[numbers] = _join(values[numbers], mesh, placements, operation)
    return joined


def _join(values: Tensor, mesh: Any, placements: Any, operation: str) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial(operation) if place.is_shard() else Replicate() for place in placements]
    return DTensor.from_local(values, mesh, parts).full_tensor()

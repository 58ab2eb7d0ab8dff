"""Bytes that autograd keeps between forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def count_saved_bytes(net: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of the distinct storages that `forward` saves, without net's parameters.

    A tensor that an autograd function keeps by another way than `save_for_backward` is not seen.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # the graph holds what it saved, so no address is used twice
    for parameter in net.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())

"""Shard a network over the processes that train it (FSDP2), a block at a time."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import is_sharded


def shard_once(net: nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard `net` under Lightning's `ModelParallelStrategy`, which has a mesh, unless it is."""
    if mesh is not None and not any(is_sharded(parameter) for parameter in net.parameters()):
        shard_blocks(net, mesh)


def shard_blocks(net: nn.Module, mesh: DeviceMesh) -> None:
    """Call `fully_shard` on every block of `net`, and on `net` for what is in none.

    A block is what stands in a `Sequential` or a `ModuleList` and has modules of its own, as the
    residual blocks of a ResNet do. Of N processes each then holds 1/N of the weights, gradients and
    optimizer's state, and gathers the weights of one block while it computes with them.

    Args:
        net: whole as yet, with its norms swapped and its weights normalised.
        mesh: of Lightning's `ModelParallelStrategy`.

    Raises:
        InputError: if the strategy is to split tensors, too.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            "ImageClassifier shards over all processes and splits no tensors: give "
            "ModelParallelStrategy a data_parallel_size of the number of processes, here "
            f"{mesh.size()}, and a tensor_parallel_size of 1."
        )
    for block in _blocks(net):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def _blocks(net: nn.Module) -> list[nn.Module]:
    """Return the blocks of `net`, those inside another one first, as `fully_shard` wants it."""
    lists = [part for part in net.modules() if isinstance(part, nn.Sequential | nn.ModuleList)]
    blocks = [block for part in lists for block in part if any(block.children())]
    return list(dict.fromkeys(reversed(blocks)))

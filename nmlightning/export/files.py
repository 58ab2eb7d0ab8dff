"""How a network is written in each format, and read by what a reader elsewhere has."""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]
Writer = Callable[[nn.Module, Tensor, Path], None]  # the network, an example of its input, the file
Reader = Callable[[Path, nn.Module], Network]  # the file, and the network that was written

_INPUT, _OUTPUT = "input", "output"  # the names in an ONNX graph


def _write_state_dict(net: nn.Module, example: Tensor, file: Path) -> None:
    torch.save(dict(net.state_dict()), file)


def _read_state_dict(file: Path, net: nn.Module) -> Network:
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def _write_onnx(net: nn.Module, example: Tensor, file: Path) -> None:
    program = torch.onnx.export(
        net,
        (example,),
        input_names=[_INPUT],
        output_names=[_OUTPUT],
        dynamic_shapes=_any_batch(),
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "dynamo gives one"
    program.save(file, external_data=False)


def _read_onnx(file: Path, net: nn.Module) -> Network:
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(str(file))
    return lambda x: torch.from_numpy(evaluator.run([_OUTPUT], {_INPUT: x.numpy()})[0])


def _write_torch_export(net: nn.Module, example: Tensor, file: Path) -> None:
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=_any_batch()), file)


def _read_torch_export(file: Path, net: nn.Module) -> Network:
    with warnings.catch_warnings():
        # Torch 2.11 says so of the weights that it reads itself.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(file).module()


def _any_batch() -> Any:
    """Return what lets the first dimension of the one input be of any size."""
    return ({0: torch.export.Dim("batch")},)


WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "state_dict": _write_state_dict,
        "onnx": _write_onnx,
        "torch_export": _write_torch_export,
    }
)
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "state_dict": _read_state_dict,
        "onnx": _read_onnx,
        "torch_export": _read_torch_export,
    }
)

"""export_network: writes a network that other programs run, checked before it is kept."""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError, check_flag, check_whole_number
from nmlightning.export.fold import FoldReport, fold_norms
from nmlightning.export.formats import FORMATS, check_target
from nmlightning.export.plain import (
    TOLERANCE,
    compute_outputs,
    copy_to_evaluate,
    draw_inputs,
    largest_difference,
    remove_parametrizations,
    swap_back,
)
from nmlightning.name_patterns import some

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


_BATCH_OF_EXAMPLE = 2  # torch.export takes a batch of 1 for one that is always 1


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        file: where.
        format: its name.
        size: in bytes.
        fold: which batch norms were folded, None if none was to be.
        made_plain: the names of the weights that parametrizations computed.
        difference: the largest of outputs from the trained network's, over the largest of these.
    """

    file: Path
    format: str
    size: int
    fold: FoldReport | None
    made_plain: tuple[str, ...]
    difference: float


def export_network(
    net: nn.Module,
    file: str | Path,
    format: str,
    input_shape: Sequence[int],
    *,
    fold: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write a network without its parametrizations and this package's norms, its norms folded.

    What is written was read back and compared with the network, in float32 on the CPU, on standard
    normal inputs x of several batch sizes: max |written(x) − net(x)| ≤ 1e-5 · max |net(x)|. Where
    that does not hold no file is written, and one that is there stays.

    Args:
        net: maps (N, *input_shape) to one tensor; it is not changed.
        file: where; its folder exists.
        format: "state_dict", for the network's own class in plain torch, in which the scale alone
            of a norm is folded, so that all keys stay (see `fold_norms`); "onnx" or "torch_export",
            which hold the whole computation, for any N.
        input_shape: the shape of one input, such as (3, 32, 32).
        fold: fold batch norms; else they are kept as torch's.
        overwrite: replace a file that is there.

    Returns:
        What was written.

    Raises:
        InputError: a setting that is not allowed; a file that cannot be written; a network that
            does not take such inputs, returns no tensor, or cannot be exported; norms that need
            this package to evaluate, for a state dict; a difference beyond 1e-5.

    Example:
        >>> export_network(net, "net.onnx", "onnx", (3, 32, 32)).file
        PosixPath('net.onnx')
    """
    file = Path(file)
    check_target(file, format, overwrite)
    check_flag("fold", fold)
    if not isinstance(input_shape, Sequence):
        raise InputError(f"input_shape is a sequence, such as (3, 32, 32), got {input_shape!r}.")
    shape = [check_whole_number("a size of input_shape", size) for size in input_shape]
    keeps_code = FORMATS[format].keeps_code
    trained = copy_to_evaluate(net)
    expected = compute_outputs(trained, shape)
    plain = copy_to_evaluate(net)
    made_plain = remove_parametrizations(plain)
    remaining = swap_back(plain)
    if keeps_code and remaining:
        raise InputError(
            f"no state dict says how {some(remaining)} evaluates: torch's norm of the same keys "
            "computes something else. Export to onnx or torch_export."
        )
    report = fold_norms(plain, keep_norms=keeps_code) if fold else None
    plain.requires_grad_(False)
    difference, size = _write(plain, file, format, shape, expected)
    return ExportReport(file, format, size, report, tuple(made_plain), difference)


def _write(
    plain: nn.Module, file: Path, format: str, shape: list[int], expected: dict[int, Tensor]
) -> tuple[float, int]:
    """Write, compare, and only then give the file its name; return difference and size."""
    try:
        with tempfile.TemporaryDirectory(prefix=".export", dir=file.parent) as folder:
            draft = Path(folder) / f"network{FORMATS[format].suffix}"
            _draw_up(plain, format, shape, draft)
            difference = _compare(draft, plain, format, shape, expected)
            if difference > TOLERANCE:
                raise InputError(
                    f"the {format} differs from the trained network by {difference:.1e} of its "
                    f"largest output, more than {TOLERANCE:.0e}; nothing was written. If it folds "
                    "norms, it may be right without: --no_fold."
                )
            size = draft.stat().st_size
            os.replace(draft, file)
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be written: {error.strerror}.") from error
    return difference, size


def _compare(
    draft: Path, plain: nn.Module, format: str, shape: list[int], expected: dict[int, Tensor]
) -> float:
    try:
        return largest_difference(READERS[format](draft, plain), expected, shape)
    except OSError:
        raise
    except Exception as error:  # onnx's evaluator fails in many ways at operators it half knows
        raise InputError(
            f"the {format} cannot be read back to be compared, so nothing was written: "
            f"{_first_cause(error)}"
        ) from error


def _draw_up(plain: nn.Module, format: str, shape: list[int], draft: Path) -> None:
    try:
        WRITERS[format](plain, draw_inputs(shape, _BATCH_OF_EXAMPLE), draft)
    except OSError:
        raise
    except Exception as error:  # torch's exporters raise classes of many kinds
        raise InputError(
            f"torch cannot export this network to {format}: {_first_cause(error)}"
        ) from error


def _first_cause(error: BaseException) -> str:
    """Return the first line of what an exporter stumbled on, which it wraps in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]

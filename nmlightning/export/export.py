"""Writes a network in plain torch for other programs, compared with the trained one before."""

import copy
import io
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmlightning.atomic_file import explain_failure, replace_file
from nmlightning.errors import InputError, check_flag, check_whole_number
from nmlightning.export.fold import FoldReport, fold_norms
from nmlightning.export.formats import FORMATS, check_target
from nmlightning.export.quantized import (
    extract_quantizers,
    find_quantized,
    insert_quantizers,
    unshare_zero_points,
)
from nmlightning.name_patterns import some
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.norms.layer_norm import FeatureNorm
from nmlightning.reports.formatting import Report
from nmlightning.surgery.fuse.fuse import unfuse
from nmlightning.surgery.fuse.trace import first_line
from nmlightning.surgery.int8 import remove_int8
from nmlightning.surgery.norm_layers import find_norm_layers
from nmlightning.surgery.swap import swap_norms
from nmlightning.weights.layer_weights import plain_modules

Network = Callable[[Tensor], Tensor]
Writer = Callable[[nn.Module, Tensor, Path], None]  # the network, an example of its input, the file
Reader = Callable[[Path, nn.Module], Network]  # the file, and the network that was written

_INPUT, _OUTPUT = "input", "output"  # the names in an ONNX graph
# Of |outputs|: float32 rounds to 6e-8 of a value, and a deep network does so hundreds of times.
TOLERANCE = 1e-5
# One may be special, and the second is that of the export; no batch is fixed then.
BATCH_SIZES = (1, 2, 5)
_SEED = 0
_BATCH_OF_EXAMPLE = 2  # torch.export would fix a batch of 1


@dataclass(frozen=True, repr=False)
class ExportReport(Report):
    """The file that was written.

    Attributes:
        file: where.
        format: its name.
        size: in bytes.
        fold: which batch norms were folded, None if none was to be.
        made_plain: the names of the weights that parametrizations computed.
        difference: the largest of outputs from the trained network's, over the largest of these.
        quantized: the names of the layers and norms with inputs in 8 bits or fewer.
        tolerance: what the difference may be: 1e-5, or what these bits make it.
    """

    file: Path
    format: str
    size: int
    fold: FoldReport | None
    made_plain: tuple[str, ...]
    difference: float
    quantized: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    def describe(self) -> str:
        """Return file, size, what was folded and changed, and why norms were left."""
        fold = "no batch norm folded, as asked" if self.fold is None else self.fold.describe()
        counts, *reasons = fold.splitlines()
        plain = f", {len(self.made_plain)} weights made plain" if self.made_plain else ""
        plain += f", {len(self.quantized)} inputs quantised" if self.quantized else ""
        size = f"{self.format}, {self.size / 1e6:.1f} MB"
        line = f"{self.file} ({size}): {counts}{plain}; outputs differ by {self.difference:.1e}"
        return "\n".join([line, *reasons])


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

    The file is read back and compared with the network, in float32 on the CPU, on standard normal
    inputs x of several batch sizes: max |written(x) − net(x)| ≤ 1e-5 · max |net(x)|. Otherwise no
    file is written, and an existing one stays.

    Of a network in int8 the file holds the weights as such and the quantisers of inputs. Then the
    difference may be that of the network in float32 without them: a value halfway between two
    numbers of a grid goes to one or the other as sums are rounded, and what follows, with it.

    Args:
        net: maps (N, *input_shape) to one tensor; it is not changed.
        file: where; its folder exists.
        format: "state_dict", for the network's class in plain torch: only the scale of a norm is
            folded, so that all keys stay (see `fold_norms`); "onnx" or "torch_export", which hold
            the whole computation, for any N.
        input_shape: the shape of one input, such as (3, 32, 32).
        fold: fold batch norms; else they are kept as torch's.
        overwrite: replace an existing file.

    Returns:
        A report of the file.

    Raises:
        InputError: a setting that is not allowed; a file that cannot be written; a network that
            does not take such inputs, returns no tensor, or cannot be exported; for a state dict
            norms that need this package to evaluate, or quantised inputs; a network in int8 that
            was not trained; a difference beyond what is allowed.

    Examples:
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
    trained = _copy_to_evaluate(net)
    quantized = tuple(find_quantized(trained))
    if keeps_code and quantized:
        raise InputError(
            f"a state dict cannot hold the quantised inputs of {some(quantized)}. Export to onnx "
            "or torch_export, or call remove_int8 for a network in floating point."
        )
    expected = _compute_outputs(trained, shape)
    plain = _copy_to_evaluate(net)
    made_plain = _remove_parametrizations(plain)
    modules = extract_quantizers(plain)
    remaining = _swap_back(plain)
    if keeps_code and remaining:
        raise InputError(
            f"a state dict cannot hold {some(remaining)}: torch's norm of the same keys computes "
            "something else. Export to onnx or torch_export."
        )
    report = fold_norms(plain, keep_norms=keeps_code) if fold else None
    insert_quantizers(modules)
    plain.requires_grad_(False)
    tolerance = TOLERANCE
    if quantized:
        _remove_parametrizations(trained)
        remove_int8(trained)
        tolerance = max(tolerance, _largest_difference(trained, expected, shape))
    difference, size = _write(plain, file, format, shape, expected, tolerance)
    return ExportReport(
        file, format, size, report, tuple(made_plain), difference, quantized, tolerance
    )


def _write(
    plain: nn.Module, file: Path, format: str, shape: list[int], expected: dict[int, Tensor],
    tolerance: float,
) -> tuple[float, int]:  # fmt: skip
    """Write, compare, and only then give the file its name; return difference and size."""
    example = _draw_inputs(shape, _BATCH_OF_EXAMPLE)
    unread = f"the {format} cannot be read back to be compared, so nothing was written"
    with tempfile.TemporaryDirectory(prefix="nmlightning") as folder:
        draft = Path(folder) / f"network{FORMATS[format].suffix}"
        cannot = f"torch cannot export this network to {format}"
        with _explain_errors(cannot), explain_failure(draft):
            WRITERS[format](plain, example, draft)
        with _explain_errors(unread):
            difference = _largest_difference(READERS[format](draft, plain), expected, shape)
        if difference > tolerance:
            raise InputError(
                f"the {format} differs from the trained network by {difference:.1e} of its "
                f"largest output, more than {tolerance:.0e}; nothing was written. If it folds "
                "norms, try --no_fold."
            )
        with replace_file(file) as opened:
            opened.write(draft.read_bytes())
        return difference, draft.stat().st_size


@contextmanager
def _explain_errors(message: str) -> Iterator[None]:
    """Turn what torch's exporters and onnx's evaluator raise, classes of many kinds, into ours."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # an exporter wraps what it met in advice
            cause = cause.__cause__
        raise InputError(f"{message}: {first_line(cause)}") from error


def _write_state_dict(net: nn.Module, example: Tensor, file: Path) -> None:
    with file.open("wb") as opened:  # which says that a disk is full; torch's own does not
        torch.save(net.state_dict(), opened)  # with its _metadata, which some classes load by


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
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the folders of this machine
    unshare_zero_points(program.model.graph)
    program.save(file, external_data=False)


def _read_onnx(file: Path, net: nn.Module) -> Network:
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(str(file))
    return lambda x: torch.from_numpy(evaluator.run([_OUTPUT], {_INPUT: x.numpy()})[0])


def _write_torch_export(net: nn.Module, example: Tensor, file: Path) -> None:
    content = io.BytesIO()  # on a full disk, torch 2.15 aborts in this, and not where it saves
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=_any_batch()), content)
    file.write_bytes(content.getbuffer())


def _read_torch_export(file: Path, net: nn.Module) -> Network:
    with warnings.catch_warnings():
        # Torch 2.11 says so of the weights that it reads itself.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(file).module()


def _any_batch() -> Any:
    """Return what lets the first dimension of the one input be of any size."""
    return ({0: torch.export.Dim("batch")},)


WRITERS: Mapping[str, Writer] = MappingProxyType(
    {"state_dict": _write_state_dict, "onnx": _write_onnx, "torch_export": _write_torch_export}
)
READERS: Mapping[str, Reader] = MappingProxyType(
    {"state_dict": _read_state_dict, "onnx": _read_onnx, "torch_export": _read_torch_export}
)


def _copy_to_evaluate(net: nn.Module) -> nn.Module:
    """Return a copy of the network in evaluation, on the CPU, in float32, its norms not fused."""
    copied = copy.deepcopy(getattr(net, "_orig_mod", net)).cpu().float().eval()
    unfuse(copied)
    return copied


@torch.no_grad()
def _remove_parametrizations(net: nn.Module) -> list[str]:
    """Make parameters of the weights that parametrizations compute, and return their names.

    Tied weights stay tied. Of classes that copies of the network share nothing changes, as it would
    by `torch.nn.utils.parametrize.remove_parametrizations`.
    """
    places = [
        (path, module, name)
        for path, module in plain_modules(net)
        if parametrize.is_parametrized(module)
        for name in module.parametrizations  # type: ignore[union-attr]
    ]
    # All are computed before any is changed: tied ones are computed from one tensor.
    values = [getattr(module, name).clone() for _, module, name in places]
    lists = [module.parametrizations[name] for _, module, name in places]  # type: ignore[index]
    sources = [getattr(each, "original", each) for each in lists]
    for _, module, _ in places:
        if parametrize.is_parametrized(module):
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
    plain: dict[int, nn.Parameter] = {}
    for (_, module, name), value, key in zip(places, values, sources, strict=True):
        others = list(module._parameters)
        module.register_parameter(name, plain.setdefault(id(key), nn.Parameter(value)))
        for other in others:  # after it, as a bias is after a weight
            module._parameters[other] = module._parameters.pop(other)
    return [f"{path}.{name}".lstrip(".") for path, _, name in places]


def _swap_back(net: nn.Module) -> list[str]:
    """Give batch norms torch's classes where evaluation is torch's; return the others' names."""
    ours = [x for x in find_norm_layers(net) if isinstance(x.module, BatchNormBase | FeatureNorm)]
    batch_norms = [x for x in ours if x.kind == "batch" and not x.unsupported_reason]
    with_statistics = [x.name for x in batch_norms if x.module.running_mean is not None]
    if with_statistics:
        swap_norms(net, "l2", include=with_statistics)
    return [x.name for x in ours if type(x.module).__module__.startswith("nmlightning.")]


def _draw_inputs(input_shape: Sequence[int], batch_size: int) -> Tensor:
    """Return standard normal inputs (batch_size, *input_shape), the same every time."""
    generator = torch.Generator().manual_seed(_SEED + batch_size)
    return torch.randn(batch_size, *input_shape, generator=generator)


@torch.no_grad()
def _compute_outputs(
    net: Callable[[Tensor], object], input_shape: Sequence[int]
) -> dict[int, Tensor]:
    """Return the network's outputs by batch size; InputError unless they are finite tensors."""
    shape = ",".join(map(str, input_shape))
    outputs: dict[int, Tensor] = {}
    for size in BATCH_SIZES:
        try:
            output = net(_draw_inputs(input_shape, size))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the network does not take inputs of shape {shape}: {reason}"
            ) from error
        if not isinstance(output, Tensor):
            raise InputError(
                f"the network returns a {type(output).__name__}; what can be exported returns one "
                "tensor."
            )
        if not output.isfinite().all():
            raise InputError(
                f"the network's outputs for standard normal inputs of shape {shape} are not "
                "finite: has its training diverged?"
            )
        outputs[size] = output
    return outputs


@torch.no_grad()
def _largest_difference(
    net: Network, expected: dict[int, Tensor], input_shape: Sequence[int]
) -> float:
    """Return max |net(x) − y| / max |y| over all batches; infinite for other shapes or NaN."""
    differences = []
    for size, y in expected.items():
        output = net(_draw_inputs(input_shape, size))
        if output.shape != y.shape:
            return math.inf
        largest, scale = float((output.double() - y.double()).abs().max()), float(y.abs().max())
        differences.append(math.inf if math.isnan(largest) else largest / (scale or 1.0))
    return max(differences)

"""Writes a network in plain torch for other programs, compared with the trained one before."""

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmlightning.atomic_file import explain_failure, replace_file
from nmlightning.errors import InputError, check_choice, check_flag
from nmlightning.export.examples import Examples, Network, plain_of
from nmlightning.export.fold import FoldReport, fold_norms
from nmlightning.export.formats import FORMATS, HALF_SAFE, check_target, file_size
from nmlightning.export.half_safe import Evaluation, HalfSafe, make_half_safe
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

# The network, its inputs, whether the length of sequences is left open, the file.
Writer = Callable[[nn.Module, Examples, bool, Path], None]
Reader = Callable[[Path, nn.Module], Network]  # the file, and the network that was written

# Of |outputs|: float32 rounds to 6e-8 of a value, and a deep network does so hundreds of times.
TOLERANCE = 1e-5


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
        inputs: their names and sizes; N and `sequence` may be any.
        input_names: in order.
        fixed: why the length of sequences is not left open, if that was tried.
        half_safe: what was swapped for float16, if that was asked for. The difference is then
            that from the swapped network.
    """

    file: Path
    format: str
    size: int
    fold: FoldReport | None
    made_plain: tuple[str, ...]
    difference: float
    quantized: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    inputs: str = ""
    input_names: tuple[str, ...] = ("input",)
    fixed: str = ""
    half_safe: HalfSafe | None = None

    def describe(self) -> str:
        """Return file, size, what was folded and changed, and why norms were left."""
        fold = "no batch norm folded, as asked" if self.fold is None else self.fold.describe()
        counts, *reasons = fold.splitlines()
        plain = f", {len(self.made_plain)} weights made plain" if self.made_plain else ""
        plain += f", {len(self.quantized)} inputs quantised" if self.quantized else ""
        if safe := self.half_safe:
            plain += f", {len(safe.swapped)} norms swapped to {safe.norm} ({safe.change:.1e} off)"
        size = f"{self.format}, {file_size(self.size)}"
        line = f"{self.file} ({size}): {counts}{plain}; outputs differ by {self.difference:.1e}"
        return "\n".join([line, *reasons])


def export_network(
    net: nn.Module,
    file: str | Path,
    format: str,
    input_shape: Sequence[int] | None = None,
    *,
    inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    lengths: Mapping[str, str] | None = None,
    half_safe: str | None = None,
    evaluate: Evaluation | None = None,
    fold: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write a network without its parametrizations and this package's norms, its norms folded.

    The file is read back and compared with the network, in float32 on the CPU, on standard normal
    or the given inputs x in several batch sizes: max |written(x) − net(x)| ≤ 1e-5 · max |net(x)|.
    Otherwise no file is written, and an existing one stays.

    Inputs are called as forward calls them, or `input` if there is one, and outputs as in the
    mapping that forward returns, or `output`, or `output_0` and so on; what is no tensor is left
    out. A file of torch_export takes inputs in order.

    Of a network in int8 the file holds the weights as such and the quantisers of inputs. Then the
    difference may be that of the network in float32 without them: a value halfway between two
    numbers of a grid goes to one or the other as sums are rounded, and what follows, with it.

    Args:
        net: maps (N, *input_shape), or the inputs, to tensors; it is not changed.
        file: where; its folder exists.
        format: "state_dict", for the network's class in plain torch: only the scale of a norm is
            folded, so that all keys stay (see `fold_norms`); "onnx" or "torch_export", which hold
            the whole computation, for any N.
        input_shape: the shape of one input, such as (3, 32, 32).
        inputs: in place of a shape, a batch by name or in order, such as of tokens. Their dimension
            1 is left open, too, if the file then is right for other lengths.
        lengths: names for dimension 1 of those inputs where it must be left open, by their names.
        half_safe: swap layer and RMS norms for inference in float16, to "scaled", which computes
            the same, or to "l1", whose weights are fitted to the trained outputs.
        evaluate: runs batches through a network and returns what it measures by name, to fit
            "l1" and compare; by default it runs the inputs.
        fold: fold batch norms; else they are kept as torch's.
        overwrite: replace an existing file.

    Returns:
        A report of the file.

    Raises:
        InputError: a setting that is not allowed; a file that cannot be written; a network that
            does not take such inputs, returns no tensor, or cannot be exported; for a state dict
            norms that need this package to evaluate, or quantised inputs; a network in int8 that
            was not trained; half_safe without norms; a difference beyond what is allowed.

    Examples:
        >>> export_network(net, "net.onnx", "onnx", (3, 32, 32)).file
        PosixPath('net.onnx')
    """
    file = Path(file)
    check_target(file, format, overwrite)
    check_flag("fold", fold)
    check_choice("half_safe", half_safe, (None, *HALF_SAFE))
    keeps_code = FORMATS[format].keeps_code
    trained = _copy_to_evaluate(net)
    quantized = tuple(find_quantized(trained))
    if keeps_code and quantized:
        raise InputError(
            f"a state dict cannot hold the quantised inputs of {some(quantized)}. Export to onnx "
            "or torch_export, or call remove_int8 for a network in floating point."
        )
    examples = Examples(trained, input_shape, inputs, lengths)
    if half_safe is not None and keeps_code:
        raise InputError("half_safe is for onnx and torch_export: a state dict has no norms.")
    if half_safe == "l1" and evaluate is None and inputs is None:
        raise InputError("half_safe l1 is fitted on batches: give inputs, or what to evaluate.")
    safe = None
    if half_safe is not None:
        safe = make_half_safe(
            trained,
            half_safe,
            evaluate or examples.run,
            lambda new, old: examples.difference(examples.adapt(new), examples.adapt(old)),
        )
    plain = copy.deepcopy(trained)
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
        floating = copy.deepcopy(trained)
        _remove_parametrizations(floating)
        remove_int8(floating)
        both = examples.adapt(floating), examples.adapt(trained)
        tolerance = max(tolerance, examples.difference(*both))
    difference, size, fixed = _write_checked(plain, trained, file, format, examples, tolerance)
    return ExportReport(
        file, format, size, report, tuple(made_plain), difference, quantized, tolerance,
        examples.describe(not fixed), tuple(examples.names), fixed, safe,
    )  # fmt: skip


def _write_checked(
    plain: nn.Module, trained: nn.Module, file: Path, format: str, examples: Examples,
    tolerance: float,
) -> tuple[float, int, str]:  # fmt: skip
    """Leave the length of sequences open if that is right; return why not with the rest."""
    fixed = ""
    adapted, expected = examples.adapt(plain), examples.adapt(trained)
    if examples.lengths and not FORMATS[format].keeps_code:
        try:
            found = _write(adapted, expected, file, format, examples, tolerance, is_open=True)
        except InputError as error:
            if examples.must_be_open:
                raise
            fixed = str(error)
        else:
            return *found, fixed
    return *_write(adapted, expected, file, format, examples, tolerance), fixed


def _write(
    plain: nn.Module, trained: nn.Module, file: Path, format: str, examples: Examples,
    tolerance: float, is_open: bool = False,
) -> tuple[float, int]:  # fmt: skip
    """Write, compare, and only then give the file its name; return difference and size."""
    unread = f"the {format} cannot be read back to be compared, so nothing was written"
    with tempfile.TemporaryDirectory(prefix="nmlightning") as folder:
        draft = Path(folder) / f"network{FORMATS[format].suffix}"
        cannot = f"torch cannot export this network to {format}"
        with _explain_errors(cannot), explain_failure(draft):
            WRITERS[format](plain, examples, is_open, draft)
        with _explain_errors(unread):
            found = READERS[format](draft, plain)
            difference = examples.difference(found, trained, is_open)
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


def _write_state_dict(net: nn.Module, examples: Examples, is_open: bool, file: Path) -> None:
    with file.open("wb") as opened:  # which says that a disk is full; torch's own does not
        state = plain_of(net).state_dict()
        torch.save(state, opened)  # with its _metadata, which some classes load by


def _read_state_dict(file: Path, net: nn.Module) -> Network:
    loaded = copy.deepcopy(net)
    plain_of(loaded).load_state_dict(torch.load(file, weights_only=True))
    return loaded


def _write_onnx(net: nn.Module, examples: Examples, is_open: bool, file: Path) -> None:
    # onnxscript 0.7 takes an addend of 1e-8 or less for 0: such an eps would be lost.
    keeps_eps = all((getattr(x, "eps", None) or 1) > 1e-8 for x in net.modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")  # of one that several inputs share
        program = torch.onnx.export(
            net,
            examples.draw(),
            input_names=examples.names,
            output_names=examples.output_names,
            dynamic_shapes=examples.dynamic_shapes(is_open),
            dynamo=True,
            verbose=False,
            optimize=keeps_eps,
        )
    assert program is not None, "dynamo gives one"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the folders of this machine
    unshare_zero_points(program.model.graph)
    program.save(file, external_data=False)


def _read_onnx(file: Path, net: nn.Module) -> Network:
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(str(file))

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {x: y.numpy() for x, y in zip(evaluator.input_names, inputs, strict=True)}
        try:
            with np.errstate(all="ignore"):
                outputs = evaluator.run(None, feed)
        except Exception:
            if find_spec("onnxruntime") is None:
                raise
            runtime: Any = import_module("onnxruntime")
            outputs = runtime.InferenceSession(str(file)).run(None, feed)
        return [torch.from_numpy(y) for y in outputs]

    return run


def _write_torch_export(net: nn.Module, examples: Examples, is_open: bool, file: Path) -> None:
    content = io.BytesIO()  # on a full disk, torch 2.15 aborts in this, and not where it saves
    # A table of positions may have a bound for them, which only AUTO finds out.
    shapes = examples.dynamic_shapes(is_open, find=True)
    torch.export.save(torch.export.export(net, examples.draw(), dynamic_shapes=shapes), content)
    file.write_bytes(content.getbuffer())


def _read_torch_export(file: Path, net: nn.Module) -> Network:
    with warnings.catch_warnings():
        # Torch 2.11 says so of the weights that it reads itself.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(file).module()


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

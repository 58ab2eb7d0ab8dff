"""Rewrites the layer and RMS norms of an ONNX file so that nothing they compute leaves float16."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, checker, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nmlightning.atomic_file import replace_file
from nmlightning.errors import InputError
from nmlightning.export.onnx_norms import HALF_SAFE, LEFT, OnnxNorm, find_onnx_norms
from nmlightning.export.onnx_values import OnnxFile, external_files, read_model, subgraphs
from nmlightning.name_patterns import by_reason, some

_OLDEST_OPSET = 11  # the first whose reductions take negative axes
TINY = 2.0**-14  # float16's least normal number, in every type: a file may become float16 later
_LARGEST_BLOCK = 32  # values that are summed at once: of thousands, one by one, float16 loses most
# What a norm may be off, of the largest output of its row, by `TensorProto.DataType`: 10 machine
# epsilons of float32, float16 and bfloat16, and more of float64, which the right one has, too.
_TOLERANCES = {1: 1.2e-6, 10: 1e-2, 16: 8e-2, 11: 1e-12}
_DIFFERENCE = 1e-4  # of the largest output of a graph; layers behind a norm make its error larger
_COARSE = {10, 16, 2, 3}, 5e-2  # of a graph in float16, bfloat16, uint8 or int8, whose steps count


@dataclass(frozen=True)
class HalfSafeReport:
    """The file that was written.

    Attributes:
        file: where, `size` bytes large; `data` are the files beside it that have its weights.
        rewritten: the norms.
        left: why others are as they were, by name.
        error: the largest of a rewritten norm by itself, over the largest output of its row.
        difference: that of the graph's outputs, over the largest; or why it is not known.
    """

    file: Path
    size: int
    data: tuple[str, ...]
    rewritten: tuple[OnnxNorm, ...]
    left: Mapping[str, str]
    error: float
    difference: float | str


def make_half_safe(
    source: Path, file: Path, inputs: Any = None, shapes: Sequence[Sequence[int]] = ()
) -> HalfSafeReport:
    """Write an ONNX file again with layer and RMS norms that square nothing above 1.

    For a row x of n values, in the type that the file has for it, t the least normal float16:

        RMS:   m = max(|x|, √eps, t), u = x/m, y = u / √(mean(u²) + (√eps/m)²)
        layer: k = max(|x|, t), d = x/2 − k/2 · mean(x/k), m = max(|d|, √eps/2, t), u = d/m,
               c = u − mean(u), y = c / √(mean(c²) + (√eps/2m)²)

    Means are of blocks of at most 32 values, then of these, where n is known. All else stays as it
    is, and external data are not read. Each rewritten norm is first compared with float64, and, if
    onnxruntime is installed and the inputs are known, the whole graph with that of `source`: its
    outputs may be off by 1e-4 of the largest, of a graph in half or int8 by 5e-2.

    Args:
        source: an ONNX file, of opset 11 or later.
        file: where; in the folder of `source` if that has external data. It may exist, and is
            neither `source` nor these.
        inputs: of the graph, as an `.npz` has them, to compare it; else they are random.
        shapes: of a sample of each, where the graph does not say it.

    Raises:
        InputError: no ONNX file, one without such norms or without its external data; a file that
            cannot be written; a norm that is off by more than 10 machine epsilons, or a graph by
            more than the above; inputs that `source` does not take.

    Examples:
        >>> make_half_safe(Path("vit.onnx"), Path("safe.onnx")).difference
        2.1e-07
    """
    model = read_model(source, partial(onnx.load, format="protobuf", load_external_data=False))
    opset = _opset(model, source)
    data = _external_data(model, source, file)
    norms = find_onnx_norms(model, source.parent)
    left = {norm.name: reason for norm in norms if (reason := _why_left(norm))}
    rewritten = tuple(norm for norm in norms if not _why_left(norm))
    if not rewritten:
        why = "; ".join(by_reason(left)) or "it has no layer or RMS norm"
        raise InputError(f"no norm of {str(source)!r} is to be rewritten: {why}.")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = [_Rewrite.of(norm, opset, types) for norm in rewritten]
    error = max(map(_check, made))
    # The node of a norm that has made the value which the new ones make gives way to them.
    pairs = [(node, each) for each in made for node in each.norm.nodes]
    _replace(model.graph, {id(node): each for node, each in pairs if each.target in node.output})
    content = model.SerializeToString()
    with replace_file(file) as opened:
        opened.write(content)
        opened.flush()
        draft = Path(opened.name)
        _check_file(draft, source)
        is_coarse = _COARSE[0] & {*types.values(), *(norm.dtype for norm in rewritten)}
        bound = _COARSE[1] if is_coarse else _DIFFERENCE
        difference = _compare(source, draft, bound, inputs, shapes)
    return HalfSafeReport(file, len(content), data, rewritten, left, error, difference)


def _opset(model: ModelProto, source: Path) -> int:
    opset = max((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), default=0)
    if opset < _OLDEST_OPSET:
        raise InputError(
            f"{str(source)!r} is of opset {opset}, older than {_OLDEST_OPSET}: convert it "
            "first, by onnx.version_converter."
        )
    return opset


def _external_data(model: ModelProto, source: Path, file: Path) -> tuple[str, ...]:
    """Return the names of the files with the weights, which lie where a reader of `file` looks."""
    names = external_files(model, source)
    for path in (source, *map(source.parent.joinpath, names)):
        if file.exists() and file.samefile(path):
            raise InputError(f"{str(file)!r} is what is read: name another file by -o.")
    name = file.name if file.name != source.name else f"{source.stem}_half_safe.onnx"
    if names and file.parent.resolve() != source.parent.resolve():
        raise InputError(
            f"{str(source)!r} keeps weights in {some(names)}, beside which an ONNX file must "
            f"lie: write {str(source.with_name(name))!r}, and copy or move them together."
        )
    return names


def _why_left(norm: OnnxNorm) -> str:
    """Return why a norm cannot be rewritten, "" if it can."""
    if norm.kind == "batch":
        return "a batch norm computes no statistics"
    if norm.kind in LEFT:
        return LEFT[norm.kind]
    if norm.kind not in ("layer", "rms"):
        return f"{norm.kind} norms are not rewritten"
    if isinstance(norm.graph, FunctionProto):
        return "is in a local function; onnx.inliner takes it out"
    if norm.dtype not in _TOLERANCES or max(norm.axes or (0,)) >= 0:
        return "its type or rank is not known; onnx.shape_inference may tell it"
    others = set() if norm.normalised else set(filter(None, norm.nodes[-1].output[1:3]))
    used = {name for node in norm.graph.node for name in _inputs(node)} if others else set()
    if others & (used | {x.name for x in norm.graph.output}):
        return "its mean or deviation is used elsewhere"
    return ""


def _inputs(node: NodeProto) -> Iterator[str]:
    """Yield the values that a node takes, itself or in its subgraphs."""
    yield from node.input
    for graph in subgraphs(node):
        yield from (name for inner in graph.node for name in _inputs(inner))


@dataclass
class _Rewrite:
    """The nodes that take a norm's place.

    Attributes:
        target: the value that they make.
        axes: of x, or of the blocks that it is reshaped to, over which they average.
        weight_dtype: that of the value, which for RMS norms may not be x's.
    """

    norm: OnnxNorm
    opset: int
    target: str
    axes: Sequence[int]
    weight_dtype: int
    nodes: list[NodeProto] = field(default_factory=list)

    @classmethod
    def of(cls, norm: OnnxNorm, opset: int, types: Mapping[str, int]) -> "_Rewrite":
        """Return the nodes for a norm, given the types of the weights."""
        axes, is_single = norm.axes or (), not norm.normalised
        dtype = types.get(norm.weight, norm.dtype) if is_single else norm.dtype
        made = cls(norm, opset, norm.normalised or norm.output, axes, dtype)
        x, y, shape = norm.input, "", ""
        for other in norm.added:
            x = made.add("Add", x, other)
        if len(norm.nodes[0].output) > 3:
            x = made.nodes[-1].output[0] = norm.nodes[0].output[3]  # the sum, which a Skip… returns
        if any(node.op_type == "Cast" for node in norm.nodes):
            x = made.add("Cast", x, to=norm.dtype)
        blocks = _blocks(norm.count or 1)
        if len(blocks) > 1 and axes == tuple(range(-len(axes), 0)):
            shape, made.axes = made.add("Shape", x), range(-len(blocks), 0)
            x = made.add("Reshape", x, made.constant([-1, *blocks]))
        y = made.scale(x)
        if shape:  # a size may be 0
            y = made.add("Reshape", y, shape, **({"allowzero": 1} if opset >= 14 else {}))
        if dtype != norm.dtype:
            y = made.add("Cast", y, to=dtype)
        if is_single and norm.weight:
            y = made.add("Mul", y, norm.weight)
        if is_single and norm.bias:
            made.add("Add", y, norm.bias)
        made.nodes[-1].output[0] = made.target
        return made

    def scale(self, x: str) -> str:
        """Add what computes the formulas of `make_half_safe`."""
        root, d, is_layer = float(np.sqrt(self.norm.eps)), x, self.norm.kind == "layer"
        if is_layer:
            half, root = self.constant(0.5), root / 2
            k = self.add("Max", self.largest(x), self.constant(TINY))
            mean = self.add("Mul", k, self.mean(self.add("Div", x, k)))
            d = self.add("Sub", self.add("Mul", x, half), self.add("Mul", mean, half))
        m = self.add("Max", self.largest(d), self.constant(max(root, TINY)))
        u = self.add("Div", d, m)
        if is_layer:
            u = self.add("Sub", u, self.mean(u))
        # √eps/m, but √eps itself may not be a normal number: many devices make 0 of that.
        of_eps = self.add(
            "Mul", self.add("Div", self.constant(TINY), m), self.constant(root / TINY)
        )
        squares = self.mean(self.add("Mul", u, u)), self.add("Mul", of_eps, of_eps)
        return self.add("Div", u, self.add("Sqrt", self.add("Add", *squares)))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.target}{HALF_SAFE}{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, value: float | Sequence[int]) -> str:
        is_number = isinstance(value, float)
        dtype = helper.tensor_dtype_to_np_dtype(self.norm.dtype) if is_number else np.int64
        return self.add("Constant", value=numpy_helper.from_array(np.array(value).astype(dtype)))

    def reduce(self, operator: str, x: str, axes: Sequence[int]) -> str:
        if self.opset < 18:
            return self.add(operator, x, axes=axes, keepdims=1)
        return self.add(operator, x, self.constant(axes), keepdims=1)

    def largest(self, x: str) -> str:
        return self.reduce("ReduceMax", self.add("Abs", x), self.axes)

    def mean(self, x: str) -> str:
        for axis in reversed(self.axes):
            x = self.reduce("ReduceMean", x, [axis])
        return x


def _blocks(count: int) -> list[int]:
    """Return factors of a number, none above 32 unless a prime factor is."""
    factors: list[int] = []
    while count > _LARGEST_BLOCK:
        factor = max(x for x in range(1, _LARGEST_BLOCK + 1) if count % x == 0)
        if factor == 1:
            break
        factors.insert(0, factor)
        count //= factor
    return [count, *factors]


def _replace(graph: GraphProto, made: Mapping[int, _Rewrite]) -> None:
    """Put new nodes in the place of norms' last steps, and take away what nothing uses any more."""
    for node in graph.node:
        for inner in subgraphs(node):
            _replace(inner, made)
    here = [made[id(node)] for node in graph.node if id(node) in made]
    old = {id(node) for each in here for node in each.norm.nodes}
    nodes = [x for n in graph.node for x in (made[id(n)].nodes if id(n) in made else [n])]
    uses = Counter(name for node in nodes for name in _inputs(node))
    uses.update(x.name for x in graph.output)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if id(node) in old and not any(uses[name] for name in node.output):
            uses.subtract(node.input)
        else:
            kept.append(node)
    if here:
        del graph.node[:]
        graph.node.extend(reversed(kept))


def _check(made: _Rewrite) -> float:
    """Return the largest error on rows of all sizes against float64, over the row's largest."""
    norm, axes, n = made.norm, made.norm.axes or (), made.norm.count or 64
    scales = np.array([[1e-4], [1e-2], [100.0], [1e4], [1.0], [10.0], [0.0]])
    rows = scales * np.random.default_rng(0).standard_normal((len(scales), n))
    rows[4] += 1000
    rows[5, 0] = 1e4
    rows = rows[: None if norm.eps else -1]  # of zeros, the original divides 0 by eps
    x = rows.reshape(len(rows), *[1] * (-1 - min(axes)), n).swapaxes(-1, axes[-1])
    values: dict[str, Any] = dict.fromkeys(norm.added, 0 * x) | {norm.input: x}
    types = dict.fromkeys(values, norm.dtype)
    if not norm.normalised:
        values |= {norm.bias: np.zeros(1), norm.weight: np.ones(1)}
        types |= dict.fromkeys((norm.bias, norm.weight), made.weight_dtype)
    feeds = {k: v.astype(helper.tensor_dtype_to_np_dtype(types[k])) for k, v in values.items() if k}
    given = [helper.make_tensor_value_info(name, types[name], None) for name in feeds]
    result = helper.make_tensor_value_info(made.target, made.weight_dtype, None)
    graph = helper.make_graph(made.nodes, "norm", given, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", made.opset)])
    evaluator: Any = ReferenceEvaluator(model)
    y = evaluator.run(None, feeds)[0].astype(np.float64)
    d = feeds[norm.input].astype(np.float64)
    d = d - d.mean(axes[-1], keepdims=True) * (norm.kind == "layer")
    right = d / np.sqrt((d * d).mean(axes[-1], keepdims=True) + norm.eps)
    sizes = np.abs(right).max(axes[-1]).clip(1e-6)
    error, bound = float((np.abs(y - right).max(axes[-1]) / sizes).max()), _TOLERANCES[norm.dtype]
    if not error <= bound:
        raise InputError(
            f"{norm.name} would be off by {error:.1e} of its largest output, more than "
            f"{bound:.0e}: nothing was written."
        )
    return error


def _check_file(file: Path, source: Path) -> None:
    """Raise InputError where onnx.checker refuses a file, and not that which it was made of."""
    try:
        checker.check_model(str(file))
    except checker.ValidationError as error:
        with suppress(checker.ValidationError):
            checker.check_model(str(source))
            reason = str(error).strip().splitlines()[0].replace(str(file), source.name)
            raise InputError(f"onnx.checker refuses what was rewritten: {reason}") from error


def _compare(
    source: Path, draft: Path, bound: float, inputs: Any, shapes: Sequence[Sequence[int]]
) -> float | str:
    """Return how far the outputs of two files are apart, or why that is unknown.

    Raises:
        InputError: given inputs that the source does not take; a draft that does not run, or is
            further off than `bound`.
    """
    if find_spec("onnxruntime") is None:
        return "not compared, for lack of onnxruntime"
    original = OnnxFile(source)
    outputs = [x.name for x in original.model.graph.output]
    try:
        feeds = original.draw_inputs(shapes) if inputs is None else original.bind_inputs(inputs)
        values = original.run(feeds, outputs)
    except InputError as error:
        if inputs is not None or shapes:
            raise
        return f"not compared: {error}"
    try:
        after = OnnxFile(draft).run(feeds, outputs)
    except InputError as error:
        reason = str(error).replace(str(draft), "what was rewritten")
        raise InputError(f"{reason} (nothing was written)") from error
    # Of integers, such as an argmax, any may follow from a tie.
    counted = [name for name in outputs if values[name].dtype.kind not in "biu"]
    before = {name: np.float64(values[name]) for name in counted if values[name].size}
    if not before:
        return "not compared: the outputs are empty, or integers"
    if not all(np.isfinite(y).all() for y in before.values()):
        return "not compared: the file itself gives inf or NaN"
    sizes = [max(np.abs(y).max(), 1e-30) for y in before.values()]
    errors = [np.abs(y - after[name]).max() for name, y in before.items()]
    difference = float(np.max(np.divide(errors, sizes)))
    if not difference <= bound:
        raise InputError(
            f"the outputs would be off by {difference:.1e} of the largest, more than {bound:.0e}: "
            "nothing was written."
        )
    return difference

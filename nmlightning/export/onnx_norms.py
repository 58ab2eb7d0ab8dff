"""Finds the norms in an ONNX graph, as single nodes or as the steps that exporters make of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmlightning.export.onnx_values import attribute_of, infer_types, subgraphs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Why norms of which only the values are known are left.
LEFT = {
    "other": "a root of summed squares, of no norm that is known",
    "scaled": "half-safe already",
}
HALF_SAFE = "/half_safe/"  # in the names of all that a rewritten norm has
# The kind that a node computes, and what its inputs are.
_SINGLE_NODES: Mapping[str, str] = {
    "LayerNormalization": "layer x weight bias",
    "SkipLayerNormalization": "layer x added weight bias added",
    "RMSNormalization": "rms x weight",
    "SimplifiedLayerNormalization": "rms x weight",
    "SkipSimplifiedLayerNormalization": "rms x added weight added",
    "InstanceNormalization": "instance x weight bias",
    "GroupNormalization": "group x weight bias",
    "GroupNorm": "group x weight bias",
    "BatchNormalization": "batch x weight bias mean variance",
}

# A step is an operator and its inputs, a list has alternatives, a word stands for a value: the same
# one wherever it is met. All means are over the same axes, and casts may lie between any two steps.
_Pattern = Any


def _square(x: _Pattern) -> _Pattern:
    return [("Pow", x, 2.0), ("Mul", x, x)]


def _normalised(d: _Pattern, variance: _Pattern) -> tuple[_Pattern, _Pattern]:
    """Return the ways to compute d / √(variance + eps), and what d is multiplied by in some."""
    inside = [("Add", variance, "eps"), variance]
    root = [("Sqrt", inside), ("Pow", inside, 0.5)]
    inverse = [("Reciprocal", root), ("Div", 1.0, root), ("Pow", inside, -0.5)]
    gain = [*inverse, ("Mul", inverse, "weight")]
    return [("Div", [d, ("Mul", d, "weight")], root), ("Mul", d, gain)], gain


_MEAN = ("ReduceMean", "x")
_CENTRED = ("Sub", "x", _MEAN)
_DIFFERENCE = ("Sub", ("ReduceMean", _square("x")), _square(_MEAN))
_VARIANCE = [
    *(("ReduceMean", _square(d)) for d in (_CENTRED, ("Sub", _MEAN, "x"))),
    *(_DIFFERENCE, ("Max", _DIFFERENCE, 0.0), ("Relu", _DIFFERENCE)),  # Flax
]
_LAYER, _GAIN = _normalised(_CENTRED, _VARIANCE)
_SHIFT, _MINUS_SHIFT = ("Mul", _MEAN, _GAIN), ("Mul", ("Neg", _MEAN), _GAIN)
_PATTERNS: Sequence[tuple[str, _Pattern]] = (
    ("layer", _LAYER),
    ("rms", _normalised("x", ("ReduceMean", _square("x")))[0]),
    # as TensorFlow and Keras have it
    (
        "layer",
        [
            ("Add", ("Mul", "x", _GAIN), [("Sub", "bias", _SHIFT), ("Add", _MINUS_SHIFT, "bias")]),
            ("Add", ("Mul", "x", _GAIN), _MINUS_SHIFT),
            ("Sub", ("Mul", "x", _GAIN), _SHIFT),
        ],
    ),
)
# tf2onnx writes a mean over all dimensions but two as a pooling.
_MEANS = {"ReduceMean": "ReduceMean", "GlobalAveragePool": "ReduceMean"}
_FLOATS = (1, 10, 11, 16)  # `TensorProto.DataType` of float32, float16, float64, bfloat16
# Between the root of a sum of squares and that sum, in norms of whatever form.
_ON_THE_WAY = {"Add", "Sub", "Mul", "Div", "Max", "Clip", "Relu", "Abs", "Cast", "Identity"}
_ON_THE_WAY |= {"Reshape", "Squeeze", "Unsqueeze", "Expand", "Where"}
_MOST_ON_THE_WAY = 64
_LARGEST_CONSTANT = 64  # elements; axes and eps have few, and weights are not read


@dataclass(frozen=True)
class OnnxNorm:
    """A norm: y = (x − mean(x)) / √(var(x) + eps) · weight + bias, or x / √(mean(x²) + eps) · …

    Attributes:
        kind: "layer", "rms", "instance", "group", "batch", or "other" of a node that has a norm in
            its name, or is the root of a sum of squares, "scaled" if they are of values up to 1: of
            both only the values are known.
        name: of its last node, or of its output, behind the names of what its graph belongs to.
        input: the value x; with `added`, x is the sum of all.
        output: the value y, behind weight and bias.
        axes: over which x is averaged, negative where its rank is known; None if unknown.
        eps: as in the file.
        weight, bias: the values' names, "" for none.
        dtype: the `TensorProto.DataType` it is computed in, 0 if unknown; x may be of another.
        count: of the values averaged, None if unknown.
        normalised: the value before weight and bias, "" where one step gives all.
        added: what a Skip… node adds to x before.
        nodes: the steps from x to y, in their order.
        graph: the graph or local function that has them.
    """

    kind: str
    name: str
    input: str
    output: str
    axes: tuple[int, ...] | None
    eps: float
    weight: str = ""
    bias: str = ""
    dtype: int = 0
    count: int | None = None
    normalised: str = ""
    added: tuple[str, ...] = ()
    nodes: tuple["NodeProto", ...] = field(default=(), repr=False, compare=False)
    graph: Any = field(default=None, repr=False, compare=False)


def find_onnx_norms(model: "ModelProto", folder: str | Path = "") -> list[OnnxNorm]:
    """Return the norms of a model, also of its subgraphs and local functions, in their order.

    No weight is read; `folder` is where the model's external data lie, for an eps that is there.

    Examples:
        >>> [norm.kind for norm in find_onnx_norms(onnx.load("vit.onnx", load_external_data=False))]
        ['layer', 'layer', 'layer']
    """
    found = list(_Scope(model.graph, infer_types(model, _LARGEST_CONSTANT), folder).norms())
    for function in model.functions:
        found += _Scope(function, {}, folder, f"{function.name}/").norms()
    return found


def _keeps_values(node: "NodeProto") -> bool:
    """Return whether a node passes numbers on, but for the rounding of another floating type."""
    is_cast = node.op_type == "Cast" and attribute_of(node, "to") in _FLOATS
    return is_cast or node.op_type == "Identity"


class _Scope:
    """A graph, or a local function: what makes each value, what takes it, and what is constant."""

    def __init__(
        self, graph: Any, types: Mapping[str, Any], folder: str | Path, path: str = "",
        outer: "_Scope | None" = None,
    ) -> None:  # fmt: skip
        self.graph, self.types, self.folder, self.path = graph, types, folder, path
        self.makers: dict[str, NodeProto] = dict(outer.makers if outer else {})
        self.tensors: dict[str, TensorProto] = dict(outer.tensors if outer else {})
        self.users: dict[str, list[NodeProto]] = {}
        self.tensors.update({x.name: x for x in getattr(graph, "initializer", ())})
        for node in graph.node:
            self.makers.update(dict.fromkeys(node.output, node))
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)

    def norms(self) -> Iterator[OnnxNorm]:
        """Yield the norms, then other roots of means or sums of squares."""
        known: set[int] = set()
        for norm in self._known_norms():
            known.update(map(id, norm.nodes))
            yield norm
        for node in self.graph.node:
            if id(node) not in known and (kind := self._kind_of_root(node)):
                other = OnnxNorm(kind, "", node.input[0], node.output[0], None, 0.0)
                yield self._complete(other, [node])

    def _kind_of_root(self, node: "NodeProto") -> str:
        """Return "other" for a root of summed squares, "scaled" if they are of values up to 1."""
        power = self._number(node.input[1]) if node.op_type == "Pow" else None
        if node.op_type != "Sqrt" and power not in (0.5, -0.5):
            return "other" if node.op_type == "ReduceL2" else ""
        behind = [(node.input[0], False)]
        for value, is_summed in behind:
            made = self.makers.get(value)
            if made is None:
                continue
            is_square = made.op_type == "Mul" and made.input[0] == made.input[1]
            if made.op_type == "Pow":
                is_square = self._number(made.input[1]) == 2
            if made.op_type == "ReduceSumSquare" or (is_summed and is_square):
                return "scaled" if self._is_scaled(made.input[0]) else "other"
            sums = made.op_type in (*_MEANS, "ReduceSum")
            if sums or (made.op_type in _ON_THE_WAY and len(behind) < _MOST_ON_THE_WAY):
                behind += [(x, is_summed or sums) for x in made.input]
        return ""

    def _is_scaled(self, value: str) -> bool:
        """Return whether a value was divided by a maximum, and perhaps centred then."""
        quotients = [
            x
            for node in self._makers([value])
            for x in ([node] if node.op_type == "Div" else self._makers(node.input[:1]))
        ]
        divisors = self._makers(x.input[1] for x in quotients if x.op_type == "Div")
        made = [x.op_type for node in divisors for x in (node, *self._makers(node.input))]
        return "ReduceMax" in made

    def _makers(self, values: Iterable[str]) -> Iterator["NodeProto"]:
        """Yield the nodes that have made values, behind those that only pass them on."""
        for value in values:
            node = self.makers.get(value)
            while node is not None and _keeps_values(node):
                node = self.makers.get(node.input[0])
            if node is not None:
                yield node

    def _known_norms(self) -> Iterator[OnnxNorm]:
        for node in self.graph.node:
            for inner in subgraphs(node):
                path = f"{self.path}{node.name or node.op_type}/"
                yield from _Scope(inner, self.types, self.folder, path, self).norms()
            if node.op_type in _SINGLE_NODES and node.domain in ("", "ai.onnx", "com.microsoft"):
                yield self._single(node)
            elif "Norm" in node.op_type:
                other = OnnxNorm("other", "", node.input[0], node.output[0], None, 0.0)
                yield self._complete(other, [node])
            elif node.op_type in ("Div", "Mul", "Add", "Sub"):
                yield from self._composed(node)

    def _single(self, node: "NodeProto") -> OnnxNorm:
        kind, *roles = _SINGLE_NODES[node.op_type].split()
        inputs = [pair for pair in zip(roles, node.input, strict=False) if pair[1]]
        values, axes = dict(reversed(inputs)), None
        x, weight = values["x"], values.get("weight", "")
        if kind in ("layer", "rms"):
            axis, sizes = attribute_of(node, "axis", -1), self._shape(x)
            if axis >= 0 and sizes is None:
                axis, sizes = 0, self._shape(weight)
            first = axis if axis < 0 or sizes is None else axis - len(sizes)
            axes = tuple(range(first, 0)) or None
        reshape = self.makers.get(x)
        if kind == "instance" and reshape is not None and reshape.op_type == "Reshape":
            shape = self._constant(reshape.input[1])  # (0, groups, −1), as torch exports them
            kind = "group" if shape is not None and shape.size == 3 else kind
        eps = attribute_of(node, "epsilon", 1e-12 if node.op_type.startswith("Skip") else 1e-5)
        bias, dtype = values.get("bias", ""), self._dtype(x) or self._dtype(weight)
        norm = OnnxNorm(kind, "", x, node.output[0], axes, eps, weight, bias, dtype)
        added = tuple(name for role, name in inputs if role == "added")
        return self._complete(replace(norm, added=added), [node])

    def _composed(self, node: "NodeProto") -> Iterator[OnnxNorm]:
        for kind, pattern in _PATTERNS:
            bound = next(self._match(pattern, node.output[0], {"steps": []}), None)
            if bound is None:
                continue
            x, steps, output = bound["x"], bound["steps"], node.output[0]
            axes, eps = bound["axes"], bound.get("eps", 0.0)
            dtype = self._dtype(output) or bound.get("dtype") or self._dtype(x)
            weight, bias, normalised = bound.get("weight", ""), bound.get("bias", ""), ""
            if not (weight or bias):
                normalised, (weight, bias, output) = output, self._affine(output, steps)
            norm = OnnxNorm(kind, "", x, output, axes, eps, weight, bias, dtype)
            yield self._complete(replace(norm, normalised=normalised), steps)
            return

    def _complete(self, norm: OnnxNorm, steps: Sequence["NodeProto"]) -> OnnxNorm:
        """Return a norm with its nodes and name, and how many values it averages."""
        chosen, sizes, axes = {id(step) for step in steps}, self._shape(norm.input), norm.axes or ()
        nodes = tuple(step for step in self.graph.node if id(step) in chosen)
        if sizes is None and axes == tuple(range(-len(axes), 0)):
            sizes = self._shape(norm.weight)
        averaged = [sizes[axis] for axis in axes] if sizes and max(axes, default=0) < 0 else [None]
        count = None if None in averaged else int(np.prod(averaged))  # type: ignore[arg-type]
        name = f"{self.path}{nodes[-1].name or norm.output}".partition(HALF_SAFE)[0]
        return replace(norm, name=name, count=count, nodes=nodes, graph=self.graph)

    def _affine(self, output: str, steps: list["NodeProto"]) -> tuple[str, str, str]:
        """Return weight, bias and output of the steps that alone take a normalised value."""
        names = {"Mul": "", "Add": ""}
        for operator in ("Cast", "Mul", "Cast", "Add", "Cast"):
            users = self.users.get(output, [])
            if len(users) == 1 and users[0].op_type == operator:
                others = [name for name in users[0].input if name != output]
                if all(map(self._is_fixed, others)):
                    names[operator] = "".join(others)
                    steps.append(users[0])
                    output = users[0].output[0]
        return names["Mul"], names["Add"], output

    def _match(
        self, pattern: _Pattern, value: str, bound: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield what the words of a pattern stand for in the steps that lead to a value."""
        if isinstance(pattern, list):
            for alternative in pattern:
                yield from self._match(alternative, value, bound)
            return
        if pattern in ("weight", "bias"):
            if bound.get(pattern, value) == value:
                yield {**bound, pattern: value}
            return
        steps, node = list(bound["steps"]), self.makers.get(value)
        while node is not None and _keeps_values(node):
            steps.append(node)
            value = node.input[0]
            node = self.makers.get(value)
        if isinstance(pattern, float) or pattern == "eps":
            number = self._number(value)
            if pattern == "eps" and number is not None:
                yield {**bound, "eps": number, "dtype": self._dtype(value)}
            elif number == pattern:
                yield bound
        elif isinstance(pattern, str):
            if bound.get(pattern, value) == value:
                yield {**bound, pattern: value, "steps": steps}
        elif node is not None and _MEANS.get(node.op_type, node.op_type) == pattern[0]:
            yield from self._match_step(pattern, node, {**bound, "steps": [*steps, node]})

    def _match_step(
        self, pattern: _Pattern, node: "NodeProto", bound: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        inputs = list(node.input)
        if node.op_type in _MEANS:
            axes = self._axes(node)
            if not axes or bound.setdefault("axes", axes) != axes:
                return
            inputs = inputs[:1]
        if len(inputs) != len(pattern) - 1:
            return
        for order in [inputs, inputs[::-1]][: 2 if node.op_type in ("Add", "Mul", "Max") else 1]:
            found = [bound]
            for part, value in zip(pattern[1:], order, strict=True):
                found = [y for x in found for y in self._match(part, value, x)]
            yield from found

    def _axes(self, node: "NodeProto") -> tuple[int, ...]:
        """Return the axes of a mean that keeps them, negative if the rank is known, () if not."""
        shape, axes = self._shape(node.input[0]), attribute_of(node, "axes")
        if node.op_type == "GlobalAveragePool":
            axes = range(2, len(shape) if shape else 3)
        elif axes is None and len(node.input) > 1:
            axes = self._constant(node.input[1])
        if axes is None or not attribute_of(node, "keepdims", 1):
            return ()
        return tuple(sorted(int(x) - len(shape or ()) * (x >= 0) for x in axes))

    def _is_fixed(self, name: str) -> bool:
        """Whether a value follows from constants alone."""
        node = self.makers.get(name)
        if node is None or name in self.tensors:
            return name in self.tensors
        return all(self._is_fixed(x) for x in node.input if x) and not any(subgraphs(node))

    def _number(self, name: str) -> float | None:
        number = self._constant(name)
        return float(number.item()) if number is not None and number.size == 1 else None

    def _constant(self, name: str) -> Any:
        """Return a constant's few elements, None for others."""
        from onnx import TensorProto, numpy_helper
        from onnx.external_data_helper import load_external_data_for_tensor

        node, tensor = self.makers.get(name), self.tensors.get(name)
        if node is not None and node.op_type == "Constant":
            value = node.attribute[0]
            tensor = value.t
            if not value.HasField("t"):
                return np.asarray(attribute_of(node, value.name))
        if tensor is None or np.prod(tensor.dims) > _LARGEST_CONSTANT:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            external, tensor = tensor, TensorProto()
            tensor.CopyFrom(external)
            load_external_data_for_tensor(tensor, str(self.folder))
        return numpy_helper.to_array(tensor)

    def _dtype(self, name: str) -> int:
        """Return the type of a value's elements, 0 if it is unknown."""
        node = self.makers.get(name)
        if name in self.tensors:
            return int(self.tensors[name].data_type)
        if node is not None and node.op_type == "Constant":
            return int(node.attribute[0].t.data_type)
        return int(self.types[name].tensor_type.elem_type) if name in self.types else 0

    def _shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the sizes of a value, None for those that are unknown, or for all."""
        if name in self.tensors:
            return tuple(self.tensors[name].dims)
        if name not in self.types or not self.types[name].tensor_type.HasField("shape"):
            return None
        return tuple(x.dim_value or None for x in self.types[name].tensor_type.shape.dim)

"""Runs an ONNX file for the values inside it, with one copy of its weights in memory."""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nmlightning.errors import InputError
from nmlightning.name_patterns import some

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Array = NDArray[Any]
BATCH_SIZE = 4  # of random inputs, where the graph fixes none
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of fields in onnx.proto
_SMALL = 1024  # bytes of a tensor that are read with the graph
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


class OnnxFile:
    """An ONNX file whose weights onnxruntime maps into memory from where they are.

    Attributes:
        model: all but the weights, with the local functions inlined.
        weights: the initializers by name, whose values `read` returns.
        inputs: the types of the graph's inputs by name.

    Raises:
        InputError: no such file, or it is no ONNX; a package or external data are missing.
    """

    def __init__(self, file: Path) -> None:
        absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        if absent:
            raise InputError(f"to run {file} needs {absent[0]}: pip install {' '.join(absent)}.")
        self.file = file
        self.model = read_model(file, _read_skeleton)
        graph = self.model.graph
        self.weights = {x.name: x for x in graph.initializer}
        self.inputs = {x.name: x.type.tensor_type for x in graph.input}
        for name in self.weights:  # which older files list as inputs
            self.inputs.pop(name, None)
        external_files(self.model, file)

    def read(self, name: str) -> Array:
        """Return an initializer's values."""
        from onnx import TensorProto, numpy_helper

        tensor = TensorProto()
        tensor.CopyFrom(self.weights[name])  # to_array would keep the values in it
        return numpy_helper.to_array(tensor, str(self.file.parent))

    def expose(self, names: Sequence[str]) -> None:
        """Make outputs of values, before the first `run`, so that it can return them."""
        known = self.inputs.keys() | {x.name for x in self.model.graph.output}
        for name in dict.fromkeys(names):
            if name not in known:
                self.model.graph.output.add(name=name)

    def run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """Return some values of a run with these inputs; InputError if these do not fit."""
        wanted = [name for name in dict.fromkeys(names) if name not in feeds]
        try:
            found = self._session.run(wanted, dict(feeds)) if wanted else []
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise InputError(f"onnxruntime cannot run {self.file}: {line}") from error
        return {**feeds, **dict(zip(wanted, found, strict=True))}

    @cached_property
    def _session(self) -> Any:
        import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

        options = ort.SessionOptions()
        options.log_severity_level = 4
        # What follows would copy weights, or hold values that are no longer needed.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(_FOLDER_OPTION, str(self.file.parent.resolve()))
        data = self.model.SerializeToString()
        return ort.InferenceSession(data, options, ["CPUExecutionProvider"])

    def bind_inputs(self, given: Mapping[str, Any] | Sequence[Any]) -> dict[str, Array]:
        """Return arrays by the names of the graph's inputs, in their dtypes.

        Those of a sequence, or as `np.savez` calls them without names, are taken in order.

        Raises:
            InputError: other names or kinds of numbers than the graph's.
        """
        if not isinstance(given, Mapping):
            given = {f"arr_{number}": array for number, array in enumerate(given)}
        names = list(given)
        if len(names) == len(self.inputs) and all(name.startswith("arr_") for name in names):
            given = dict(zip(self.inputs, given.values(), strict=True))
        if given.keys() != self.inputs.keys():
            raise InputError(
                f"the inputs are {some(names)}; {self.file} takes {some(self.inputs)}."
            )
        bound = {}
        for name, array in given.items():
            try:
                bound[name] = np.asarray(array).astype(self._dtype(name), casting="same_kind")
            except TypeError as error:
                raise InputError(f"the input {name!r} of {self.file}: {error}.") from error
        return bound

    def draw_inputs(self, shapes: Sequence[Sequence[int]] = ()) -> dict[str, Array]:
        """Return random inputs: standard normal, and of integers 0 or 1, as ids and masks may be.

        Args:
            shapes: of one sample of each input in order, or of all; none for what the graph says.

        Raises:
            InputError: a size that the graph does not say.
        """
        if len(shapes) not in (0, 1, len(self.inputs)):
            raise InputError(f"{len(shapes)} shapes are given for {some(self.inputs)}.")
        generator = np.random.default_rng(0)
        drawn = {}
        for number, (name, type) in enumerate(self.inputs.items()):
            sizes: list[Any] = [x.dim_value or None for x in type.shape.dim]
            if shapes:
                sizes = [*(sizes[:1] or [None]), *shapes[number % len(shapes)]]
            sizes[:1] = [size or BATCH_SIZE for size in sizes[:1]]
            if None in sizes or not (shapes or type.HasField("shape")):
                words = ", ".join(str(x.dim_value or x.dim_param or "?") for x in type.shape.dim)
                raise InputError(
                    f"the shape of the input {name!r} is {f'({words})' if words else 'not known'}: "
                    "give arrays by --inputs, or the sizes behind the first by --input_shape."
                )
            normal, bits = generator.standard_normal(sizes), generator.integers(0, 2, sizes)
            drawn[name] = (normal if self._dtype(name).kind == "f" else bits).astype(
                self._dtype(name)
            )
        return drawn

    def _dtype(self, name: str) -> np.dtype[Any]:
        from onnx.helper import tensor_dtype_to_np_dtype

        return tensor_dtype_to_np_dtype(self.inputs[name].elem_type)


def read_model(file: Path, read: Callable[[Path], "ModelProto"]) -> "ModelProto":
    """Return what `read` makes of an ONNX file, or raise InputError where it is none."""
    if file.is_dir():
        raise InputError(f"{str(file)!r} is a folder; name the ONNX file in it.")
    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r} in {Path.cwd()}.")
    with suppress(Exception):  # of several classes, from bytes that mean something else
        if (model := read(file)).graph.node:
            return model
    raise InputError(f"{str(file)!r} is no ONNX file, or is truncated.")


def external_files(model: "ModelProto", file: Path) -> tuple[str, ...]:
    """Return the names of the files with a model's weights, or raise InputError for absent ones."""
    parts = [x for tensor in model.graph.initializer for x in tensor.external_data]
    names = tuple(dict.fromkeys(x.value for x in parts if x.key == "location"))
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise InputError(f"{str(file)!r} keeps weights in {some(missing)}, not beside it.")
    return names


def subgraphs(node: "NodeProto") -> Iterator["GraphProto"]:
    """Yield the graphs that an If, Loop or Scan has."""
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.HasField("g") else attribute.graphs


def attribute_of(node: "NodeProto", name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute."""
    from onnx.helper import get_attribute_value

    return next((get_attribute_value(x) for x in node.attribute if x.name == name), default)


def infer_types(model: "ModelProto", most: int) -> dict[str, Any]:
    """Return the types of values by name, as far as onnx infers them.

    Of constants those of `most` elements are read, and of weights only the sizes.
    """
    from onnx import ModelProto, TensorProto, shape_inference

    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.functions.extend(model.functions)
    for part in ("node", "input", "output", "value_info"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    for x in model.graph.initializer:
        empty = TensorProto(name=x.name, dims=x.dims, data_type=x.data_type)
        light.graph.initializer.append(x if np.prod(x.dims) <= most else empty)
    with suppress(Exception):  # of nodes that it does not know; what the file says is left
        light = shape_inference.infer_shapes(light, data_prop=True)
    types, graphs = {}, [light.graph]
    for graph in graphs:
        types.update({x.name: x.type for x in [*graph.input, *graph.output, *graph.value_info]})
        graphs += [inner for node in graph.node for inner in subgraphs(node)]
    return types


def _read_skeleton(file: Path) -> "ModelProto":
    """Return a model whose weights are external data, be it in the file itself, inlined."""
    from onnx import ModelProto, TensorProto, inliner

    model = ModelProto()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, begin, start, end in _fields(data, 0, len(data)):
            if number != _GRAPH:
                model.MergeFromString(data[begin:end])
                continue
            for part, part_begin, part_start, part_end in _fields(data, start, end):
                if part != _INITIALIZER:
                    model.graph.MergeFromString(data[part_begin:part_end])
                    continue
                tensor = model.graph.initializer.add()
                for field, at, first, last in _fields(data, part_start, part_end):
                    if field != _RAW_DATA or last - first < _SMALL:
                        tensor.MergeFromString(data[at:last])
                        continue
                    tensor.data_location = TensorProto.EXTERNAL
                    place = {"location": file.name, "offset": first, "length": last - first}
                    for key, value in place.items():
                        tensor.external_data.add(key=key, value=str(value))
    return inliner.inline_local_functions(model) if model.functions else model


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each field of a protobuf message its number, begin, begin of content, and end."""
    while at < end:
        begin = at
        key, start = _varint(data, at)
        size = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 in (0, 2):
            size, stop = _varint(data, start)
            start, size = (stop, size) if key & 7 == 2 else (start, stop - start)
        at = start + size
        yield key >> 3, begin, start, at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at

"""Test which norms are found in ONNX files, and what they are when rewritten."""

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from nmlightning import InputError
from nmlightning.export.half_safe_onnx import HalfSafeReport, make_half_safe
from nmlightning.export.onnx_norms import OnnxNorm, find_onnx_norms
from nmlightning.export.onnx_values import OnnxFile
from nmlightning.probe.inference import probe_inference
from other_libraries import convnext, llama, vit

Array = NDArray[Any]
N = 512
HEADER = '<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
CENTRED = "m = ReduceMean<axes = [-1]>(x)\nd = Sub(x, m)\n"
SQUARED = "q = Pow(d, two)\nv = ReduceMean<axes = [-1]>(q)\ne = Add(v, eps)\n"
ROOT = f"{SQUARED}s = Sqrt(e)\n"


def parse(
    steps: str, opset: int = 13, sizes: str = "N, 8", dtype: str = "FLOAT", n: int = 8
) -> ModelProto:
    """Return the model that makes y of x by these steps, with weights w and b of 1.5."""
    text = HEADER.format(opset=opset) + (
        f"g (float[{sizes}] x) => (float[{sizes}] y)\n<float[1] w = {{1.5}}, float[1] b = {{1.5}}, "
        "float eps = {0.00001}, float two = {2.0}, float one = {1.0}, float half = {0.5}, "
        f"float minus = {{-0.5}}, float zero = {{0.0}}, int64[1] last = {{-1}}>\n{{\n{steps}\n}}"
    )
    model = parser.parse_model(text)  # which knows no numbers in half
    kind = TensorProto.DataType.Value(dtype)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = kind
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = np.resize(numpy_helper.to_array(tensor), [n] * len(tensor.dims))
            value = value.astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def find(steps: str, **options: Any) -> OnnxNorm:
    (norm,) = find_onnx_norms(parse(steps, **options))
    return norm


# Each with kind, weight and bias, and the number of steps.
STEPS = {
    "torch": (f"{CENTRED}{ROOT}z = Div(d, s)\nu = Mul(z, w)\ny = Add(u, b)", "layer", "w", "b", 9),
    "weight first": (
        f"{CENTRED}{ROOT}z = Div(d, s)\nu = Mul(w, z)\ny = Add(b, u)", "layer", "w", "b", 9,
    ),
    "weight before the root": (
        f"{CENTRED}{ROOT}z = Mul(w, d)\ny = Div(z, s)", "layer", "w", "", 8,
    ),
    "no weight": (f"{CENTRED}{ROOT}y = Div(d, s)", "layer", "", "", 7),
    "centred twice": (
        f"{CENTRED}{ROOT}d2 = Sub(x, m)\ny = Div(d2, s)", "layer", "", "", 8,
    ),
    "product": (
        f"{CENTRED}q = Mul(d, d)\nv = ReduceMean<axes = [-1]>(q)\ne = Add(eps, v)\n"
        "s = Pow(e, half)\ny = Div(d, s)", "layer", "", "", 7,
    ),
    "axes as input": (
        "m = ReduceMean(x, last)\nd = Sub(x, m)\nq = Mul(d, d)\nv = ReduceMean(q, last)\n"
        "e = Add(v, eps)\ns = Sqrt(e)\nr = Reciprocal(s)\ny = Mul(r, d)", "layer", "", "", 8,
    ),
    "no eps": (
        f"{CENTRED}q = Mul(d, d)\nv = ReduceMean<axes = [-1]>(q)\ns = Sqrt(v)\ny = Div(d, s)",
        "layer", "", "", 6,
    ),
    "statistics in float32": (
        "t = Cast<to = 1>(x)\n" + f"{CENTRED}{ROOT}".replace("(x", "(t") +
        "z = Div(d, s)\nh = Cast<to = 10>(z)\nu = Mul(h, w)\nf = Cast<to = 1>(u)\ny = Add(f, b)",
        "layer", "w", "b", 12,
    ),
    "keras": (
        f"{CENTRED}{ROOT}r = Reciprocal(s)\ng = Mul(r, w)\np = Mul(x, g)\nk = Mul(m, g)\n"
        "t = Sub(b, k)\ny = Add(p, t)", "layer", "w", "b", 12,
    ),
    "keras 3": (
        f"{CENTRED}{ROOT}r = Reciprocal(s)\ng = Mul(r, w)\np = Mul(x, g)\no = Neg(m)\n"
        "k = Mul(o, g)\nt = Add(k, b)\ny = Add(p, t)", "layer", "w", "b", 13,
    ),
    "keras 3, no bias": (
        f"{CENTRED}{ROOT}r = Reciprocal(s)\ng = Mul(r, w)\np = Mul(x, g)\no = Neg(m)\n"
        "k = Mul(o, g)\ny = Add(k, p)", "layer", "w", "", 12,
    ),
    "keras, no weight": (
        f"{CENTRED}{ROOT}r = Reciprocal(s)\np = Mul(x, r)\nk = Mul(m, r)\ny = Sub(p, k)",
        "layer", "", "", 10,
    ),
    "weight with the root": (
        f"{CENTRED}{ROOT}r = Reciprocal(s)\ng = Mul(r, w)\ny = Mul(d, g)", "layer", "w", "", 9,
    ),
    "flax": (
        "m = ReduceMean<axes = [-1]>(x)\nq = Mul(x, x)\np = ReduceMean<axes = [-1]>(q)\n"
        "k = Mul(m, m)\nt = Sub(p, k)\nv = Max(zero, t)\ne = Add(v, eps)\ns = Sqrt(e)\n"
        "r = Reciprocal(s)\ng = Mul(r, w)\nd = Sub(x, m)\ny = Mul(d, g)", "layer", "w", "", 12,
    ),
    "llama": (
        f"{ROOT}r = Div(one, s)\nz = Mul(x, r)\ny = Mul(w, z)".replace("d,", "x,"),
        "rms", "w", "", 7,
    ),
    "t5": (
        f"t = Cast<to = 1>(x)\n{SQUARED}r = Pow(e, minus)\nz = Mul(x, r)\ny = Mul(w, z)".replace(
            "(d,", "(t,"), "rms", "w", "", 7,
    ),
    "gated": (f"{ROOT}z = Div(x, s)\ny = Mul(z, x)".replace("d,", "x,"), "rms", "", "", 5),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_found(name: str) -> None:
    steps, kind, weight, bias, count = STEPS[name]
    norm = find(steps, opset=18 if name == "axes as input" else 13)
    assert (norm.kind, norm.input, norm.weight, norm.bias) == (kind, "x", weight, bias)
    assert (norm.axes, norm.count, norm.dtype) == ((-1,), 8, TensorProto.FLOAT)
    assert norm.eps == pytest.approx(0 if name == "no eps" else 1e-5)
    assert norm.output == ("z" if name == "gated" else "y")
    assert len(norm.nodes) == count


@pytest.mark.parametrize(("sizes", "axes"), {"2, 4, 8": (-1,), "2, 3, 4, 8": (-2, -1)}.items())
def test_means_may_be_poolings(sizes: str, axes: tuple[int, ...]) -> None:
    """As tf2onnx writes them."""
    steps = STEPS["torch"][0].replace("ReduceMean<axes = [-1]>", "GlobalAveragePool")
    assert find(steps, sizes=sizes).axes == axes


@pytest.mark.parametrize(
    "steps",
    [
        f"{CENTRED}{ROOT}y = Div(x, s)",  # not what was squared
        f"{CENTRED}{ROOT}y = Mul(d, s)",
        f"{CENTRED}{ROOT}y = Div(d, s)".replace("two)", "half)"),
        f"{CENTRED}{ROOT}y = Div(d, s)".replace("(v, eps)", "(v, x)"),
    ],
)
def test_other_steps_are_no_norm(steps: str) -> None:
    assert {norm.kind for norm in find_onnx_norms(parse(steps))} <= {"other"}


OTHER_ROOTS = (
    # weight, mean or eps elsewhere than in any known norm; sums; deviations of n - 1
    f"{CENTRED}{SQUARED}s = Sqrt(v)\nt = Add(s, eps)\ny = Div(d, t)",
    f"{CENTRED}{SQUARED}k = Mul(v, w)\ns = Sqrt(k)\ny = Div(d, s)",
    "q = Mul(x, x)\nv = ReduceSum(q, last)\nk = Div(v, two)\ns = Sqrt(k)\ny = Div(x, s)",
    "v = ReduceSumSquare<axes = [-1]>(x)\nk = Max(v, eps)\ns = Pow(k, half)\ny = Div(x, s)",
    "s = ReduceL2<axes = [-1]>(x)\ny = Div(x, s)",
)


@pytest.mark.parametrize("steps", OTHER_ROOTS)
def test_other_roots_of_squares_are_named(steps: str, tmp_path: Path) -> None:
    norm = find(steps)
    assert (norm.kind, norm.name) == ("other", "s")
    onnx.save(parse(steps), tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"norm to measure in .*: a root of summed"):
        probe_inference(tmp_path / "a.onnx", [np.ones((2, 8), np.float32)])
    with pytest.raises(InputError, match="s: a root of summed squares, of no norm that is known"):
        make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx")


@pytest.mark.parametrize(
    "steps", ["t = ReduceMean<axes = [-1]>(x)\ny = Sqrt(t)", "y = Pow(x, half)"]
)
def test_other_roots_are_no_norm(steps: str) -> None:
    assert find_onnx_norms(parse(steps)) == []


def test_means_over_other_axes_are_no_centre() -> None:
    norm = find(f"{CENTRED}{ROOT}y = Div(d, s)".replace("[-1]>(q)", "[0]>(q)"))
    assert (norm.kind, norm.input, norm.axes) == ("rms", "d", (-2,))


SINGLE = {
    "LayerNormalization<axis = 1, epsilon = 0.5>(x, w, b)": ("layer", (-1,), "w", "b", ()),
    "LayerNormalization<axis = -2>(x, w)": ("layer", (-2, -1), "w", "", ()),
    "RMSNormalization(x, w)": ("rms", (-1,), "w", "", ()),
    "SimplifiedLayerNormalization(x, w)": ("rms", (-1,), "w", "", ()),
    "com.microsoft.SimplifiedLayerNormalization(x, w)": ("rms", (-1,), "w", "", ()),
    "com.microsoft.SkipLayerNormalization(x, x2, w, b, b)": ("layer", (-1,), "w", "b", ("x2", "b")),
    "com.microsoft.SkipLayerNormalization(x, x2, w)": ("layer", (-1,), "w", "", ("x2",)),
    "com.microsoft.SkipSimplifiedLayerNormalization(x, x2, w, b)": (
        "rms", (-1,), "w", "", ("x2", "b"),
    ),
    "InstanceNormalization(x, w, b)": ("instance", None, "w", "b", ()),
    "GroupNormalization<num_groups = 2>(x, w, b)": ("group", None, "w", "b", ()),
    "BatchNormalization(x, w, b, w, w)": ("batch", None, "w", "b", ()),
    "LpNormalization(x)": ("other", None, "", "", ()),
}  # fmt: skip


@pytest.mark.parametrize("node", SINGLE)
def test_single_nodes_are_found(node: str) -> None:
    norm = find(f"x2 = Identity(x)\ny = {node}", opset=23)
    assert (norm.kind, norm.axes, norm.weight, norm.bias, norm.added) == SINGLE[node]
    default = 1e-12 if "Skip" in node else 1e-5 * (norm.kind != "other")
    assert norm.eps == pytest.approx(0.5 if "epsilon" in node else default)
    assert (norm.normalised, norm.dtype) == ("", TensorProto.FLOAT * (norm.kind != "other"))


def test_sizes_follow_from_constants() -> None:
    norm = find("t = Reshape(x, last)\ny = LayerNormalization(t, w)", sizes="4, 4", opset=17)
    assert norm.count == 16


def test_group_norms_are_told_from_instance_norms() -> None:
    make = "c = Constant<value = int64[3] {0, 2, -1}>()\nr = Reshape(x, c)\n"
    norm = find(f"{make}y = InstanceNormalization(r, w, b)")
    assert norm.kind == "group"


BRANCH = "g () => (float[16, 8] z) { z = LayerNormalization(x, w, b) }"
IF = f"k = Cast<to = 9>(one)\ny = If(k) <then_branch = {BRANCH}, else_branch = {BRANCH}>"


def test_subgraphs_and_functions_are_searched() -> None:
    function = parser.parse_function(
        '<domain: "local", opset_import: ["" : 17]> Block (a, c) => (r)'
        "{ r = LayerNormalization(a, c) }"
    )
    model = parse(IF, opset=17)
    model.graph.node[-1].name = "If_0"
    model.functions.append(function)
    norms = find_onnx_norms(model)
    assert [norm.name for norm in norms] == ["If_0/z", "If_0/z", "Block/r"]
    assert [norm.dtype for norm in norms] == [TensorProto.FLOAT, TensorProto.FLOAT, 0]
    assert norms[2].axes == (-1,)


def test_constants_in_external_data_are_read(tmp_path: Path) -> None:
    model = parse(STEPS["torch"][0])
    onnx.save(
        model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0
    )
    model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    (norm,) = find_onnx_norms(model, tmp_path)
    assert norm.eps == pytest.approx(1e-5)


class ReduceMean(OpRun):  # type: ignore[misc]
    """Sums one by one in the type of x, as a simple runtime does."""

    op_domain = ""

    def _run(self, x: Array, axes: Any = None, keepdims: int = 1, **_: Any) -> tuple[Array]:
        (axis,) = map(int, axes)
        total = np.zeros_like(np.take(x, [0], axis))
        for i in range(x.shape[axis]):
            total = total + np.take(x, [i], axis)
        return (total / np.array(x.shape[axis], x.dtype),)


def rows(dtype: Any = np.float16) -> Array:
    """Return rows (16, N) of all sizes, with offsets, outliers, and zeros."""
    x = np.random.default_rng(0).standard_normal((16, N))
    x[:8] *= 10.0 ** np.arange(-4, 4)[:, None]
    x[8] *= 1e4
    x[9] = 7
    x[10] += 30
    x[11] = 1e-2 * x[11] + 10
    x[12, 0] = 1000
    x[13] = np.sign(x[13]) * 65000
    x[14] = np.where(np.arange(N) == 0, 65000, -20000)
    x[15] = 0
    return x.astype(dtype)


def normalise(x: Array, kind: str, eps: float = 1e-5) -> Array:
    d = x.astype(np.float64)
    d = d - d.mean(-1, keepdims=True) * (kind == "layer")
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps)


def rewrite(model: ModelProto, folder: Path) -> tuple[ModelProto, HalfSafeReport]:
    onnx.save(model, folder / "a.onnx")
    report = make_half_safe(folder / "a.onnx", folder / "b.onnx")
    return onnx.load(folder / "b.onnx"), report


NAMES = [name for name in STEPS if name not in ("statistics in float32", "t5", "no eps", "gated")]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_right_in_float16(name: str, tmp_path: Path) -> None:
    steps, kind, weight, bias, _ = STEPS[name]
    opset = 18 if name == "axes as input" else 13
    model = parse(steps, opset, f"16, {N}", "FLOAT16", N)
    safe, report = rewrite(model, tmp_path)
    assert (len(report.rewritten), report.left) == (1, {})
    x = rows()
    evaluator: Any = ReferenceEvaluator(safe, new_ops=[ReduceMean])
    y = evaluator.run(None, {"x": x})[0]
    right = normalise(x, kind, float(np.float16(1e-5)))
    right = right * (1.5 if weight else 1) + (1.5 if bias else 0)
    size = np.abs(right).max(-1, keepdims=True).clip(1e-6)
    assert np.abs((y - right) / size).max() <= 1e-2


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("node", SINGLE)
def test_single_nodes_are_right(node: str, dtype: str, tmp_path: Path) -> None:
    kind, axes, _, bias, added = SINGLE[node]
    model = parse(f"x2 = Identity(x)\ny = {node}", 23, f"16, {N}", dtype, N)
    if kind not in ("layer", "rms"):
        with pytest.raises(InputError, match=rf"is to be rewritten: y: (a batch|{kind}|a root)"):
            rewrite(model, tmp_path)
        return
    safe, _ = rewrite(model, tmp_path)
    x = rows(helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype)))
    x = x / (4 if added else 1)
    y = ReferenceEvaluator(safe).run(None, {"x": x})[0].astype(float)
    wide = x * (2 if added else 1) + x.dtype.type(1.5) * ("b" in added)
    if len(axes) == 2:
        wide = wide.reshape(1, -1)
    eps = 0.5 if "eps" in node else 1e-12 if "Skip" in node else 1e-5
    right = normalise(wide, kind, eps).reshape(x.shape) * 1.5 + 1.5 * bool(bias)
    over = tuple(axes)
    numbers = [numpy_helper.to_array(n.attribute[0].t) for n in safe.graph.node if not n.input]
    assert all(np.abs(number).min() >= 2.0**-14 for number in numbers), "devices flush others to 0"
    error = np.abs(y - right).max(over) / np.abs(right).max(over).clip(1e-6)
    # Ten machine epsilons, and of float64 more, in which `right` is computed.
    bounds = {"FLOAT16": 1e-2, "BFLOAT16": 8e-2, "FLOAT": 1.2e-6, "DOUBLE": 1e-12}
    assert error.max() <= bounds[dtype]


def export(net: nn.Module, x: torch.Tensor, opset: int, file: Path) -> None:
    """Write what torch exports, by the exporter of its time, and let it print nothing."""
    arguments: dict[str, Any] = {"dynamo": opset >= 18, "opset_version": opset}
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            torch.onnx.export(net.eval(), (x,), file, external_data=opset == 20, **arguments)
    finally:
        logging.disable(logging.NOTSET)


IMAGES = torch.randn(2, 3, 32, 32)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, int, dict[str, int]]] = {
    "torchvision": (vit, IMAGES, 14, {"layer": 5}),
    "timm": (lambda: timm.models.VisionTransformer(**VIT), IMAGES, 20, {"layer": 5}),
    "timm, LayerNorm2d": (convnext, IMAGES, 13, {"layer": 9}),
    "transformers": (lambda: llama(use_cache=False), torch.arange(6)[None], 18, {"rms": 5}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_they_were_but_for_their_norms(name: str, tmp_path: Path) -> None:
    make, x, opset, kinds = MODELS[name]
    export(make(), x, opset, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    helper.set_model_props(model, {"author": "someone"})
    onnx.save(model, tmp_path / "a.onnx")
    report = make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert isinstance(report.difference, float)
    assert report.difference <= 1e-5
    found = [norm.kind for norm in report.rewritten]
    assert {kind: found.count(kind) for kind in found} == kinds
    safe = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    norms = find_onnx_norms(model)
    gone = {id(node) for norm in norms for node in norm.nodes}
    kept = [node.SerializeToString() for node in model.graph.node if id(node) not in gone]
    now = [node.SerializeToString() for node in safe.graph.node]
    assert [node for node in now if node in kept] == kept
    for each in (model, safe):
        del each.graph.node[:]
    assert safe.SerializeToString() == model.SerializeToString()
    with pytest.raises(InputError, match="half-safe already"):
        make_half_safe(tmp_path / "b.onnx", tmp_path / "c.onnx")


def test_rewritten_norms_are_known_behind_casts(tmp_path: Path) -> None:
    """As converters to float16 put them around a maximum."""
    steps = "t = LayerNormalization(x, w)\ny = RMSNormalization(t, w)"
    safe, _ = rewrite(parse(steps, 23), tmp_path)
    for node in list(safe.graph.node):
        if node.op_type == "Max":
            (name,) = node.output
            node.output[0] = f"{name}_"
            safe.graph.node.append(helper.make_node("Cast", [f"{name}_"], [name], to=1))
    assert [norm.kind for norm in find_onnx_norms(safe)] == ["scaled", "scaled"]


def test_casts_to_whole_numbers_stay(tmp_path: Path) -> None:
    steps = f"k = Cast<to = 6>(x)\nt = Cast<to = 1>(k)\n{CENTRED}{ROOT}y = Div(d, s)"
    steps = steps.replace("(x)\nd = Sub(x", "(t)\nd = Sub(t")
    assert find(steps).input == "k"
    onnx.save(parse(steps), tmp_path / "a.onnx")
    make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx", [10 * np.random.rand(4, 8)])


def test_weights_are_multiplied_in_the_type_that_they_had(tmp_path: Path) -> None:
    steps = STEPS["weight with the root"][0].replace("w)", "c)")
    model = parse(f"c = Cast<to = 1>(h)\n{steps}")
    half = np.random.rand(8).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(half, "h"))
    _, report = rewrite(model, tmp_path)
    assert report.error < 1e-6


@pytest.mark.parametrize("opset", [14, 18])
def test_sizes_may_be_0(opset: int, tmp_path: Path) -> None:
    steps = STEPS["torch"][0] if opset < 18 else STEPS["axes as input"][0]
    onnx.save(parse(steps, opset, f"N, M, {N}", n=N), tmp_path / "a.onnx")
    make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx", [np.ones((2, 0, N), np.float32)])
    empty = OnnxFile(tmp_path / "b.onnx").run({"x": np.ones((2, 0, N), np.float32)}, ["y"])["y"]
    assert empty.shape == (2, 0, N)
    with pytest.raises(InputError, match=r"cannot run .*a\.onnx"):
        make_half_safe(tmp_path / "a.onnx", tmp_path / "c.onnx", shapes=[(3, N - 1)])


def test_values_that_others_use_stay(tmp_path: Path) -> None:
    steps = f"{CENTRED}{ROOT}z = Div(d, s)\nk = Mul(z, w)\ny = Add(k, m)"
    safe, report = rewrite(parse(steps, 13, f"16, {N}", n=N), tmp_path)
    assert [node.op_type for node in safe.graph.node if not node.name] == [
        "ReduceMean",
        "Mul",
        "Add",
    ]
    assert isinstance(report.difference, float)
    assert report.difference <= 1e-6


def test_sums_that_skip_nodes_return_stay(tmp_path: Path) -> None:
    node = "t = Identity(x)\nk, m, i, s = com.microsoft.SkipLayerNormalization(x, t, w)\n"
    _, report = rewrite(parse(f"{node}y = Add(s, k)", 17, "16, 8"), tmp_path)
    assert (len(report.rewritten), report.difference) == (1, pytest.approx(0, abs=1e-6))
    with pytest.raises(InputError, match="k: its mean or deviation is used elsewhere"):
        rewrite(parse(f"{node}y = Add(i, k)", 17, "16, 8"), tmp_path)


def test_norms_in_branches_are_rewritten(tmp_path: Path) -> None:
    safe, report = rewrite(parse(IF, 17, "16, 8"), tmp_path)
    assert len(report.rewritten) == 2
    assert report.difference == pytest.approx(0, abs=1e-6)
    assert "LayerNormalization" not in str(safe)


def test_inputs_without_a_rank_are_not_drawn(tmp_path: Path) -> None:
    model = parse(f"{CENTRED}{ROOT}y = Div(d, s)")
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.ClearField("shape")
    _, report = rewrite(model, tmp_path)
    assert str(report.difference).startswith(
        "not compared: the shape of the input 'x' is not known"
    )
    with pytest.raises(
        InputError, match="shape of the input 'x' is not known: give arrays by --in"
    ):
        OnnxFile(tmp_path / "a.onnx").draw_inputs()
    compared = make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx", shapes=[(3, 8)])
    assert compared.difference == pytest.approx(0, abs=1e-6)
    for x in (np.arange(8.0), np.ones((2, 8))):  # a row alone, too
        assert probe_inference(tmp_path / "a.onnx", [x]).layers[0].values == 8


def test_files_that_give_no_numbers_are_not_compared(tmp_path: Path) -> None:
    norm = "z = LayerNormalization(x, w, b)\n"
    _, report = rewrite(parse(f"{norm}m = Sub(w, w)\ny = Div(z, m)", 17, "16, 8"), tmp_path)
    assert report.difference == "not compared: the file itself gives inf or NaN"
    source, file = tmp_path / "a.onnx", tmp_path / "b.onnx"
    rewrite(parse(f"{norm}y = Identity(z)", 17), tmp_path)
    empty = make_half_safe(source, file, {"x": np.ones((0, 8), np.float32)})
    assert empty.difference == "not compared: the outputs are empty, or integers"


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
def test_graphs_that_are_off_are_not_written(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those off by more than graphs of their type may be, or that onnxruntime cannot run."""
    model, run = parse("y = LayerNormalization(x, w, b)", 17, "16, 8", dtype), OnnxFile.run
    for factor in (1.03, np.nan):

        def spoil(self: OnnxFile, *args: Any, factor: float = factor) -> Any:
            is_draft = self.file.name != "a.onnx"
            return {k: v * (factor if is_draft else 1) for k, v in run(self, *args).items()}

        monkeypatch.setattr(OnnxFile, "run", spoil)
        if (dtype, factor) == ("FLOAT16", 1.03):
            assert rewrite(model, tmp_path)[1].difference == pytest.approx(0.03, abs=5e-3)
            (tmp_path / "b.onnx").unlink()
            continue
        with pytest.raises(InputError, match=r"would be off by (3\.0e-02|nan) of .*more than .e-0"):
            rewrite(model, tmp_path)

    def fail(self: OnnxFile, *args: Any) -> Any:
        return run(self, {} if self.file.name != "a.onnx" else args[0], args[1])

    monkeypatch.setattr(OnnxFile, "run", fail)
    with pytest.raises(InputError, match=r"cannot run what was rewritten: .*nothing was written"):
        rewrite(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_external_data_are_not_read(tmp_path: Path) -> None:
    model = parse("z = LayerNormalization(x, w, b)\ny = Add(z, b)", 17)
    huge = 2**29 + 8  # elements: more bytes than a protobuf may have, and none of them on the disk
    table = TensorProto(name="t", dims=[huge], data_type=TensorProto.FLOAT, data_location=1)
    for key, value in {"location": "a.data", "offset": "0", "length": str(4 * huge)}.items():
        table.external_data.add(key=key, value=value)
    model.graph.initializer.append(table)
    with (tmp_path / "a.data").open("wb") as data:
        data.truncate(4 * huge)
    onnx.save(model, tmp_path / "a.onnx")
    report = make_half_safe(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.data == ("a.data",)
    assert report.difference == pytest.approx(0, abs=1e-6)
    (tmp_path / "other").mkdir()
    for name, advised in {"b.onnx": "b.onnx", "a.onnx": "a_half_safe.onnx"}.items():
        with pytest.raises(InputError, match=rf"an ONNX file must lie: write '.*/{advised}'"):
            make_half_safe(tmp_path / "a.onnx", tmp_path / "other" / name)
    for name in ("a.onnx", "a.data", "other/../a.onnx"):
        with pytest.raises(InputError, match="is what is read: name another file"):
            make_half_safe(tmp_path / "a.onnx", tmp_path / name)
    (tmp_path / "a.data").unlink()
    with pytest.raises(InputError, match=r"keeps weights in a\.data, not beside it"):
        make_half_safe(tmp_path / "a.onnx", tmp_path / "c.onnx")

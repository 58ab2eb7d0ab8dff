"""Test which norms are found in ONNX graphs, as nodes and as the steps of exporters."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, parser

from nmlightning.export.onnx_norms import OnnxNorm, find_onnx_norms

HEADER = '<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
CENTRED = "m = ReduceMean<axes = [-1]>(x)\nd = Sub(x, m)\n"
SQUARED = "q = Pow(d, two)\nv = ReduceMean<axes = [-1]>(q)\ne = Add(v, eps)\n"
ROOT = f"{SQUARED}s = Sqrt(e)\n"


def parse(steps: str, opset: int = 13, sizes: str = "N, 8", dtype: str = "float") -> ModelProto:
    """Return the model that makes y of x by these steps, with weights w and b."""
    numbers = ", ".join(["1.5"] * 8)
    text = HEADER.format(opset=opset) + (
        f"g ({dtype}[{sizes}] x) => ({dtype}[{sizes}] y)\n<{dtype}[8] w = {{{numbers}}}, "
        f"{dtype}[8] b = {{{numbers}}}, {dtype} eps = {{0.00001}}, {dtype} two = {{2.0}}, "
        f"{dtype} one = {{1.0}}, {dtype} half = {{0.5}}, {dtype} minus = {{-0.5}}, "
        f"int64[1] last = {{-1}}>\n{{\n{steps}\n}}"
    )
    return parser.parse_model(text)


def find(steps: str, **options: Any) -> OnnxNorm:
    (norm,) = find_onnx_norms(parse(steps, **options))
    return norm


# Each with kind, weight and bias, and the number of steps.
STEPS = {
    "torch": (f"{CENTRED}{ROOT}z = Div(d, s)\nu = Mul(z, w)\ny = Add(u, b)", "layer", "w", "b", 9),
    "weight first": (
        f"{CENTRED}{ROOT}z = Div(d, s)\nu = Mul(w, z)\ny = Add(b, u)", "layer", "w", "b", 9,
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
    assert (norm.axes, norm.shape, norm.dtype) == ((-1,), (None, 8), TensorProto.FLOAT)
    assert norm.eps == pytest.approx(0 if name == "no eps" else 1e-5)
    assert norm.output == ("z" if name == "gated" else "y")
    assert len(norm.nodes) == count


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
}  # fmt: skip


@pytest.mark.parametrize("node", SINGLE)
def test_single_nodes_are_found(node: str) -> None:
    norm = find(f"x2 = Identity(x)\ny = {node}", opset=23)
    assert (norm.kind, norm.axes, norm.weight, norm.bias, norm.added) == SINGLE[node]
    default = 1e-12 if "Skip" in node else 1e-5
    assert norm.eps == pytest.approx(0.5 if "epsilon" in node else default)
    assert (norm.normalised, norm.dtype) == ("", TensorProto.FLOAT)


def test_group_norms_are_told_from_instance_norms() -> None:
    make = "c = Constant<value = int64[3] {0, 2, -1}>()\nr = Reshape(x, c)\n"
    norm = find(f"{make}y = InstanceNormalization(r, w, b)")
    assert norm.kind == "group"


def test_subgraphs_and_functions_are_searched() -> None:
    inner = "z = LayerNormalization(x, w, b)"
    both = [
        helper.make_attribute(name, parser.parse_graph(f"{name} () => (float[N, 8] z) {{{inner}}}"))
        for name in ("then_branch", "else_branch")
    ]
    function = parser.parse_function(
        '<domain: "local", opset_import: ["" : 17]> Block (a, c) => (r)'
        "{ r = LayerNormalization(a, c) }"
    )
    model = parse("k = Cast<to = 9>(one)\ny = If(k)", opset=17)
    model.graph.node[-1].name = "If_0"
    model.graph.node[-1].attribute.extend(both)
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

#!/usr/bin/env bash
# onnxruntime 1.32.0: session.x64quantprecision fails where two layers share the tensor of their weights' zero point.
#
# Expected: the session option session.x64quantprecision = 1 lets a quantised graph run where products of uint8 and int8
#   saturate: weights become uint8. An initialiser may have several users; exporters make one of equal ones, as torch's
#   does. So a graph loads with the option as without it, and gives the same.
# Seen: two quantised convolutions that have one initialiser as zero point, an int8 0, load without the option. With it the
#   session is refused: "Attempt to replace the existing tensor". With a zero point each, or none given, both load and
#   outputs agree.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnx==1.23.2' 'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SHAPE = [1, 4, 5, 5]
ZERO_POINTS = {"shared": ("z", "z"), "one each": ("z1", "z2"), "none given": ("", "")}


def model(names):
    rng = np.random.default_rng(0)
    held = {"s": np.float32(0.02), "u": np.uint8(128)}
    held |= {name: np.int8(0) for name in names if name}
    nodes, x = [], "x"
    for i, name in enumerate(names):
        held[f"w{i}"] = rng.integers(-128, 128, (4, 4, 1, 1)).astype(np.int8)
        nodes += [
            helper.make_node("QuantizeLinear", [x, "s", "u"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", "s", "u"], [f"x{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", "s", *[name] * bool(name)], [f"v{i}"]),
            helper.make_node("Conv", [f"x{i}", f"v{i}"], [f"y{i}"]),
        ]
        x = f"y{i}"
    nodes += [
        helper.make_node("QuantizeLinear", [x, "s", "u"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "u"], ["out"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in ("x", "out")]
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(graph, precise, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", precise)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


print("onnxruntime", onnxruntime.__version__)
x = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
for what, names in ZERO_POINTS.items():
    graph = model(names).SerializeToString()
    plain = run(graph, "0", x)
    try:
        off = float(np.abs(run(graph, "1", x) - plain).max())
        seen = f"off by {off:.2g}"
    except Exception as error:
        off, seen = None, str(error).strip().rpartition(" : ")[2]
    print(f"zero points {what}: with the option {seen}")
    assert off is None if what == "shared" else off is not None and off < 0.021
PYTHON
venv/bin/python show.py

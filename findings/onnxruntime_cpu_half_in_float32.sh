#!/usr/bin/env bash
# onnxruntime 1.32.0: a float16 graph on the CPU keeps values that float16 cannot hold.
#
# Expected: in a graph whose tensors are all float16 each operator's result is rounded to float16, at least
#   with graph optimisations disabled: 300² = 90,000 overflows to infinity, and a layer norm written
#   as ReduceMean, Sub, Pow, ReduceMean, Sqrt, Div gives zeros, as it does on a GPU.
# Seen: operators without a float16 kernel are run in float32 and the casts between neighbours are
#   removed, at every optimisation level: the squares stay finite, and the norm is right to float16's
#   rounding. When the squares are an output of the graph as well, that output is infinite, yet the norm
#   computed from them is still right. So a CPU run does not show whether a model survives float16.
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

SHAPE = [4, 64]
STEPS = [  # a layer norm from single operators
    ("ReduceMean", ["x"], "mean"),
    ("Sub", ["x", "mean"], "centred"),
    ("Pow", ["centred", "two"], "squares"),
    ("ReduceMean", ["squares"], "variance"),
    ("Sqrt", ["variance"], "deviation"),
    ("Div", ["centred", "deviation"], "y"),
]


def model(*outputs):
    nodes = [
        helper.make_node(operator, inputs, [output], **({"axes": [-1]} if "Mean" in operator else {}))
        for operator, inputs, output in STEPS
    ]
    x, *ends = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT16, SHAPE) for n in ("x", *outputs)
    )
    two = numpy_helper.from_array(np.array(2, np.float16), "two")
    graph = helper.make_graph(nodes, "graph", [x], ends, [two])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


print("onnxruntime", onnxruntime.__version__)
x = np.random.default_rng(0).normal(0, 300, SHAPE).astype(np.float16)
wide = x.astype(np.float64)
exact = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    for outputs in (["y"], ["y", "squares"]):
        session = onnxruntime.InferenceSession(
            model(*outputs).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        y, *squares = session.run(None, {"x": x})
        error = np.abs(y - exact).max()
        print(f"{level}, outputs {outputs}: off by {error:.2g},", *(f"squares {s.max()}" for s in squares))
        assert error < 5e-3 and all(np.isinf(s).any() for s in squares)
PYTHON
venv/bin/python show.py

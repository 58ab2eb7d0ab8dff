#!/usr/bin/env bash
# onnxconverter-common 1.16.0: a model that casts to float32 itself does not load once converted.
#
# Expected: convert_float_to_float16 gives a model that onnxruntime loads, as for other models: what
#   the graph casts to float32, as exported language models do for their norms, is cast to float16
#   with all else, or stays in float32 with casts around it.
# Seen: the model's own Cast keeps its target, float32, while its output is declared float16, and
#   what follows gets both types. The converter says nothing; onnxruntime refuses the file.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnxconverter-common==1.16.0' 'onnx==1.23.2' \
  'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, checker, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16

print("onnxconverter-common", version("onnxconverter-common"))
float32 = TensorProto.FLOAT
nodes = [
    helper.make_node("Mul", ["x", "x"], ["squares"]),
    helper.make_node("Cast", ["squares"], ["wide"], to=float32),
    helper.make_node("Mul", ["wide", "weight"], ["y"]),
]
values = [helper.make_tensor_value_info(name, float32, [2]) for name in "xy"]
weight = numpy_helper.from_array(np.ones(2, np.float32), "weight")
graph = helper.make_graph(nodes, "graph", values[:1], values[1:], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
checker.check_model(model, full_check=True)
converted = convert_float_to_float16(model, keep_io_types=True)
(cast,) = [node for node in converted.graph.node if "wide" in node.output]
print("the model's Cast is to float32:", cast.attribute[0].i == float32)
try:
    onnxruntime.InferenceSession(converted.SerializeToString())
    refusal = ""
except Exception as error:
    refusal = str(error)
print(refusal)
assert cast.attribute[0].i == float32 and "Type Error" in refusal
PYTHON
venv/bin/python show.py

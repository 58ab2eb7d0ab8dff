#!/usr/bin/env bash
# openvino 2026.4.1: compress_to_fp16 makes a finite number of an infinite weight.
#
# Expected: float16 has an infinity, so that a constant of inf, such as the -inf of an attention mask,
#   stays inf, as a cast of numpy or torch leaves it; a finite number that float16 does not hold stays
#   float32, or is said to be changed.
# Seen: inf and 1e5 both become 65504 and -inf -65504, without a message; what masks out, or marks a
#   failure, is a number now. Without compression all three stay, and so they do where three quarters
#   of a constant are beyond float16.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'openvino==2026.4.1' 'onnx==1.23.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

print("openvino", openvino.__version__)
stored = np.array([np.inf, -np.inf, 1e5, 1.0, 1.0, 1.0, 1.0, 1.0], np.float32)
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in "xy"]
node = helper.make_node("Mul", ["x", "weight"], ["y"])
weight = numpy_helper.from_array(stored, "weight")
graph = helper.make_graph([node], "graph", values[:1], values[1:], [weight])
opset = [helper.make_opsetid("", 18)]
onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), "net.onnx")
for compressed in (False, True):
    openvino.save_model(openvino.convert_model("net.onnx"), "net.xml", compress_to_fp16=compressed)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    net = openvino.Core().compile_model("net.xml", "CPU", options)
    found = net(np.ones(8, np.float32))[0].tolist()
    print("compressed" if compressed else "as it is", found)
    assert found[:3] == ([65504.0, -65504.0, 65504.0] if compressed else stored[:3].tolist())
PYTHON
venv/bin/python show.py

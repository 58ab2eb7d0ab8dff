#!/usr/bin/env bash
# onnx 1.23.2: the reference evaluator's QuantizeLinear makes large values 0 instead of 255.
#
# Expected: QuantizeLinear is y = saturate(x / y_scale + y_zero_point), in [0, 255] for uint8. By the evaluator that
#   defines the operators, 3e9 and infinity become 255, and minus these 0, as by onnxruntime.
# Seen: x / y_scale becomes an int32 before it is cut to the range. From 2³¹ on it is not held, and 3e9, 1e20 and infinity
#   become 0, the other end (-128 for int8); 2e9 is right. onnxruntime saturates.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnx==1.23.2' 'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

X = np.array([100, 2e9, 3e9, 1e20, np.inf, -3e9, -np.inf], np.float32)
TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def model(name):
    held = {"scale": np.float32(1), "zero_point": np.zeros((), name)}
    node = helper.make_node("QuantizeLinear", ["x", *held], ["q"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(X)])
    q = helper.make_tensor_value_info("q", TYPES[name], [len(X)])
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
    graph = helper.make_graph([node], "graph", [x], [q], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


warnings.simplefilter("ignore")  # numpy warns of the cast
print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
print("x", X)
for name in TYPES:
    ends = np.iinfo(name)
    expected = np.clip(X, ends.min, ends.max).astype(name)
    graph = model(name)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    by_runtime = session.run(None, {"x": X})[0]
    by_reference = ReferenceEvaluator(graph).run(None, {"x": X})[0]
    print(f"{name}: reference {by_reference}, onnxruntime {by_runtime}")
    assert (by_runtime == expected).all()
    assert (by_reference[:2] == expected[:2]).all()
    assert (by_reference[2:5] == ends.min).all()
PYTHON
venv/bin/python show.py

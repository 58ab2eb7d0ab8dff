#!/usr/bin/env bash
# onnxruntime 1.32.0: CalibMaxIntermediateOutputs, an option to save memory, throws calibration data away.
#
# Expected: quantize_static merges the ranges of so many batches at a time; by its docstring the result is
#   the same as without the option.
# Seen: when so many batches are collected they are dropped before their ranges are taken. With 8 and
#   20 batches the scales are those of the last 4; a range seen before is cut off, here at a tenth. With
#   a number that divides that of the batches nothing is left: "No data is collected".
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, quantize_static

N = 16
logging.disable(logging.WARNING)
random = np.random.default_rng(0)
batches = [random.standard_normal((64, N)).astype(np.float32) for _ in range(20)]
batches[3] *= 10
weight = numpy_helper.from_array(random.standard_normal((N, N)).astype(np.float32), "weight")
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, N]) for name in "xy")
graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "linear", [x], [y], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
onnx.save(model, "model.onnx")


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter(batches)

    def get_next(self):
        batch = next(self.left, None)
        return None if batch is None else {"x": batch}


def scale(used):
    values = np.concatenate(used)
    return (values.max() - values.min()) / 255


for limit, used in ((None, batches), (32, batches), (8, batches[16:]), (5, None)):
    options = {} if limit is None else {"CalibMaxIntermediateOutputs": limit}
    try:
        quantize_static("model.onnx", "int8.onnx", Reader(), extra_options=options)
    except ValueError as error:
        print(f"CalibMaxIntermediateOutputs={limit}: {error}")
        assert used is None
        continue
    scales = {each.name: numpy_helper.to_array(each) for each in onnx.load("int8.onnx").graph.initializer}
    exact = InferenceSession("model.onnx").run(None, {"x": batches[3]})[0]
    seen = InferenceSession("int8.onnx").run(None, {"x": batches[3]})[0]
    error = np.linalg.norm(seen - exact) / np.linalg.norm(exact)
    print(f"CalibMaxIntermediateOutputs={limit}: scale {float(scales['x_scale']):.4f}, error of batch 3 {error:.3f}")
    assert abs(scales["x_scale"] / scale(used) - 1) < 1e-3 and (error > 0.5) == (limit == 8)
PYTHON
venv/bin/python -W ignore show.py

#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static's calibration by entropy cuts nothing off: its ranges are those of min-max.
#
# Expected: CalibrationMethod.Entropy chooses the range of least divergence, as TensorRT's, which it
#   cites: one outlier of 50 among 64,000 values of deviation 1 does not make the range.
# Seen: its histogram has 128 bins and is quantised to 128: the one range to choose from is the widest,
#   to the bit that of MinMax. Only a later batch with larger values adds others, all wider than the first
#   batch. No option of quantize_static changes the bins; a calibrator made by hand with 512 chooses a
#   third of the range.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnxruntime==1.32.0' 'onnx==1.23.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import contextlib
import logging
import os

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator, quantize_static

N = 16
logging.disable(logging.WARNING)
random = np.random.default_rng(0)
batches = [random.standard_normal((1_000, N)).astype(np.float32) for _ in range(4)]
batches[0][0, 0] = 50
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


def scale(method):
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        quantize_static("model.onnx", "int8.onnx", Reader(), calibrate_method=method)
    initializers = onnx.load("int8.onnx").graph.initializer
    return float(next(numpy_helper.to_array(each) for each in initializers if each.name == "x_scale"))


def largest(bins):
    options = {"num_bins": bins}
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        calibrator = create_calibrator(
            "model.onnx", calibrate_method=CalibrationMethod.Entropy, extra_options=options)
        calibrator.collect_data(Reader())
        return float(calibrator.compute_data()["x"].range_value[1])


scales = {method.name: scale(method) for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy)}
ranges = {bins: largest(bins) for bins in (128, 512)}
print(f"scales of the input by quantize_static: {scales}")
print(f"largest value by create_calibrator, by the number of bins: {ranges}")
assert scales["Entropy"] == scales["MinMax"] > 50 / 255
assert ranges[128] == 50 and ranges[512] < 20
PYTHON
venv/bin/python -W ignore show.py

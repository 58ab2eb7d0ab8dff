#!/usr/bin/env bash
# onnxconverter-common 1.16.0: float16 conversion caps a running variance at 10,000.
#
# Expected: a constant that float16 can hold (up to 65,504) is rounded to the nearest float16 value, and
#   only a larger one is clamped, to 65,504. A batch norm with a running variance of 30,000 then gives
#   the same output as before to about 0.1 %.
# Seen: convert_float_to_float16 clamps constants at max_finite_val, which is 1e4 by default, not float16's
#   largest value. The variance of 30,000 becomes 10,000, and that channel's output is √3 times too
#   large. With max_finite_val=65504 it is right. (Small variances are raised to 1e-7 likewise.)
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'onnxconverter-common==1.16.0' 'onnx==1.23.2' \
    'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common import float16

VARIANCES = np.array([1.0, 9e3, 3e4], np.float32)


def batch_norm():
    """A model of one batch norm in evaluation, with VARIANCES as running variances."""
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    values = {"scale": ones, "bias": zeros, "mean": zeros, "var": VARIANCES}
    node = helper.make_node("BatchNormalization", ["x", *values], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, 8, 8]) for n in "xy"]
    constants = [numpy_helper.from_array(v, n) for n, v in values.items()]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def output_scales(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0].std((0, 2, 3))


rng = np.random.default_rng(0)
x = (rng.normal(size=(16, 3, 8, 8)) * np.sqrt(VARIANCES)[:, None, None]).astype(np.float32)
before = output_scales(batch_norm(), x)
for options, expected in (({}, [1, 1, 3**0.5]), ({"max_finite_val": 65504}, [1, 1, 1])):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = float16.convert_float_to_float16(batch_norm(), keep_io_types=True, **options)
    kept = next(c for c in half.graph.initializer if c.name == "var")
    ratio = output_scales(half, x) / before
    print(options, "variances", numpy_helper.to_array(kept), "output / output before", ratio.round(3))
    assert np.allclose(ratio, expected, rtol=5e-3)
PYTHON
venv/bin/python show.py

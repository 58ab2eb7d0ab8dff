#!/usr/bin/env bash
# onnxruntime 1.32.0: by default the float32 bias of a quantised convolution becomes an int32 that may not hold it.
#
# Expected: in a graph QuantizeLinear → DequantizeLinear → Conv → QuantizeLinear with int8 weights and a bias in float32
#   every level of optimisation gives the same output to a step of the last grid. Where no integer holds the bias, the
#   convolution stays in floating point; onnxruntime's quantiser avoids that case since 1.20 (pull 22020).
# Seen: the optimisation WeightBiasQuantization makes the bias a multiple of the input's scale times the weight's. Of a
#   channel of nearly no weight, as a batch norm with a gain of nearly 0 leaves when it is folded, the bias overflows: the
#   output is 0, not 0.5. With scales as of 2 bits a bias of 0.225 is rounded to 0.25, six steps of the output.
#   Without that optimisation, or with none, both are right.
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

CASES = {  # scale of the input and of the weights, their integers, bias
    "a usual channel": (2**-8, 2**-8, 100, 0.5),
    "nearly no weight": (2**-8, 2**-30, 100, 0.5),
    "weights of 2 bits": (2**-1, 2**-1, -2, 0.225),
}


def model(input_scale, weight_scale, weight, bias):
    tensors = {
        "s": np.float32(input_scale),
        "z": np.uint8(0),
        "w": np.full((1, 1, 1, 1), weight, np.int8),
        "ws": np.float32(weight_scale),
        "wz": np.int8(0),
        "b": np.array([bias], np.float32),
        "ys": np.float32(2**-8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wq"]),
        helper.make_node("Conv", ["xq", "wq", "b"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "ys", "z"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "ys", "z"], ["out"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 1, 4]) for n in ("x", "out")
    ]
    held = [numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


print("onnxruntime", onnxruntime.__version__)
x = np.zeros((1, 1, 1, 4), np.float32)  # so that the bias is all
for name, case in CASES.items():
    graph = model(*case).SerializeToString()
    outputs = {}
    for how in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL", "without WeightBiasQuantization"):
        options = onnxruntime.SessionOptions()
        if how.startswith("ORT"):
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, how)
        left_out = [] if how.startswith("ORT") else ["WeightBiasQuantization"]
        session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
        )
        outputs[how] = float(session.run(None, {"x": x})[0].flat[0])
    print(f"{name}: bias {case[3]}, output", outputs)
    none, all_of_them, without = outputs.values()
    assert none == without and abs(none - case[3]) <= 2**-9
    off = abs(all_of_them - none) * 2**8
    assert off == 0 if name == "a usual channel" else off > 5
PYTHON
venv/bin/python show.py

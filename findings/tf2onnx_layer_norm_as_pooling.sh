#!/usr/bin/env bash
# tf2onnx 1.17.0 with tensorflow-cpu 2.21.0: the layer norm of a sequence is no norm to onnxruntime.
#
# Expected: means over the last axis become ReduceMean, whatever the rank, and onnxruntime makes of
#   the steps of a layer norm, in any model, the one node LayerNormalization.
# Seen: of inputs of three dimensions, as all sequences are, and of these alone, the means become
#   GlobalAveragePool, which gives the same numbers. onnxruntime 1.32.0 does not see a norm in that:
#   of 2 or 4 dimensions there is one LayerNormalization, of 3 all nine steps are left, which then
#   run, and in a file converted to float16 round, one by one.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'tensorflow-cpu==2.21.0' 'tf2onnx==1.17.0' 'onnx==1.23.2' \
  'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx


def layer_norm(x):
    d = x - tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.pow(d, 2.0), -1, keepdims=True)
    return d / tf.sqrt(variance + 1e-6) * tf.fill([32], 1.5) + tf.fill([32], 0.5)


for shape in ((7, 32), (2, 7, 32), (2, 3, 7, 32)):
    signature = (tf.TensorSpec(shape, tf.float32, name="x"),)
    model, _ = tf2onnx.convert.from_function(
        tf.function(layer_norm), input_signature=signature, opset=17
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimised.onnx"
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    written = [node.op_type for node in model.graph.node]
    run = [node.op_type for node in onnx.load("optimised.onnx").graph.node]
    print(f"{len(shape)} dimensions: {' '.join(written)}; onnxruntime runs {' '.join(run)}")
    assert (written.count("GlobalAveragePool") == 2) is (len(shape) == 3)
    assert run == (written if len(shape) == 3 else ["LayerNormalization"])
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python -W ignore show.py

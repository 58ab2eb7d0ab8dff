#!/usr/bin/env bash
# Keras 3.15.1 with TensorFlow and tf2onnx 1.17.0: a model with GELU is exported to ONNX that no
# runtime loads.
#
# Expected: Model.export(format="onnx") of a Dense layer with activation="gelu", Keras' spelling of
#   the activation of most Transformers, runs in onnxruntime, or raises an error.
# Seen: Keras 3.15 computes the exact GELU by erfc, which ONNX does not have and tf2onnx does not
#   know. It logs "Unsupported ops", writes a node Erfc, Keras prints "Saved artifact", and the
#   process exits with 0. onnxruntime 1.32.0 refuses the file. With activation=gelu, approximate, the
#   file runs and agrees.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'keras==3.15.1' 'tensorflow-cpu==2.21.0' 'tf2onnx==1.17.0' \
  'onnx==1.23.2' 'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import keras
import numpy as np
import onnx
import onnxruntime

x = np.linspace(-3, 3, 16, dtype="float32").reshape(2, 8)


def approximate(values):
    return keras.activations.gelu(values, approximate=True)


for name, gelu in {"exact": "gelu", "approximate": approximate}.items():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(4, activation=gelu)(inputs))
    right = model.predict(x, verbose=0)
    model.export(f"{name}.onnx", format="onnx", verbose=False)
    kinds = {node.op_type for node in onnx.load(f"{name}.onnx").graph.node}
    try:
        session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x})
        result = f"off by {np.abs(found - right).max():.0e}"
        assert name == "approximate" and np.allclose(found, right, atol=1e-5)
    except onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph as error:
        result = str(error).rsplit(",", 1)[-1].strip()
        assert name == "exact" and "Erfc" in kinds and "No Op registered for Erfc" in result
    print(f"{name}: {' '.join(sorted(kinds))}: {result}")
PYTHON
TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python -W ignore show.py

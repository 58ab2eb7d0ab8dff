#!/usr/bin/env bash
# Keras 3.15.1: under the policy mixed_float16 UnitNormalization makes zeros of rows of usual size.
#
# Expected: like LayerNormalization, RMSNormalization and GroupNormalization it computes in float32
#   what it squares, so rows of length 1 come out, whatever their size; and the metric
#   CosineSimilarity of float16 vectors with themselves is 1, as the loss of that name says.
# Seen: the sum of squares is float16. With 512 features it is infinite from a deviation of 11.3 on
#   (n s^2 > 65,504), and the output is 0: finite, no message, for any backend. The other three norms
#   are right at 300. The metric is 0, the loss -1.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'keras==3.15.1' 'jax==0.10.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import keras
import numpy as np
from keras import layers

keras.config.set_dtype_policy("mixed_float16")
rows = np.random.default_rng(0).standard_normal((4, 512)).astype("float32")
rows /= rows.std(1, keepdims=True)
NORMS = (
    layers.UnitNormalization(),
    layers.LayerNormalization(),
    layers.RMSNormalization(),
    layers.GroupNormalization(4),
)
for size in (1, 11, 12, 300):
    print(f"deviation {size}, length of a row:", end="")
    for norm in NORMS:
        lengths = np.linalg.norm(np.asarray(norm(size * rows), float), axis=1)
        print(f" {type(norm).__name__} {lengths.min():.3g}", end="")
        is_unit = type(norm).__name__ == "UnitNormalization"
        right = (1 if is_unit else 512**0.5) * (not (is_unit and size > 11.3))
        assert np.allclose(lengths, right, rtol=1e-2)
    print()
vectors = np.float16(50 * rows)
loss = float(keras.losses.CosineSimilarity()(vectors, vectors))
metric = keras.metrics.CosineSimilarity()
metric.update_state(vectors, vectors)
print("cosine similarity of vectors with themselves: loss", loss, "metric", float(metric.result()))
assert abs(loss + 1) < 1e-3 and float(metric.result()) == 0
PYTHON
KERAS_BACKEND=jax venv/bin/python -W ignore show.py

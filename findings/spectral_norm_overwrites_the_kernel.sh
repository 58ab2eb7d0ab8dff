#!/usr/bin/env bash
# Keras 3.15.1 and flax 0.12.8 (NNX): spectral normalization replaces the weights that it wraps.
#
# Expected: as in the paper, torch and Flax linen, the layer computes with w / sigma(w), a
#   function of a weight w that only the optimizer changes; a forward pass does not.
# Seen: each forward pass in training, of NNX each pass, writes w / sigma into the kernel itself. The
#   length of the weight that was trained, or loaded, is gone after a few batches without an
#   optimizer, and no gradient passes through sigma. Keras' evaluation divides by nothing: before the
#   first batch of training it computes with the weights as they are. In linen the kernel stays.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'keras==3.15.1' 'flax==0.12.8' 'jax==0.10.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import jax
import jax.numpy as jnp
import keras
import numpy as np
from flax import linen, nnx

x = np.random.default_rng(0).standard_normal((4, 32)).astype("float32")
key = jax.random.PRNGKey(0)


def sigma(kernel):
    return float(np.linalg.norm(np.asarray(kernel), 2))


def show(name, before, after, evaluated, kept):
    print(
        f"{name}: sigma of the kernel {sigma(before):.3f}, evaluated as {evaluated:.3f}, after 200 "
        f"forward passes in training {sigma(after):.3f}"
    )
    assert abs(sigma(after) - (sigma(before) if kept else 1)) < 1e-2
    assert sigma(before) > 1.2


def gain(layer):
    """Return the spectral norm of a linear map, by the images of unit vectors."""
    return sigma(layer(np.eye(32, dtype="float32")))


layer = keras.layers.SpectralNormalization(keras.layers.Dense(16, use_bias=False))
layer(x)
before, evaluated = np.array(layer.layer.kernel), gain(lambda e: layer(e, training=False))
for _ in range(200):
    layer(x, training=True)
show("Keras", before, layer.layer.kernel, evaluated, kept=False)

dense = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))
normed, before = nnx.SpectralNorm(dense, rngs=nnx.Rngs(1)), np.array(dense.kernel[...])
evaluated = gain(lambda e: normed(e, update_stats=False))
for _ in range(200):
    normed(x, update_stats=True)
show("Flax NNX", before, dense.kernel[...], evaluated, kept=False)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, update_stats=True):
        return linen.SpectralNorm(linen.Dense(16, use_bias=False))(x, update_stats=update_stats)


state = Linen().init(key, x)
before = state["params"]["Dense_0"]["kernel"]
for _ in range(200):
    y, changed = Linen().apply(state, x, mutable=["batch_stats"])
    state = {**state, **changed}
evaluated = gain(lambda e: Linen().apply(state, jnp.asarray(e), update_stats=False))
show("Flax linen", before, state["params"]["Dense_0"]["kernel"], evaluated, kept=True)
assert abs(evaluated - 1) < 1e-2
PYTHON
JAX_PLATFORMS=cpu KERAS_BACKEND=jax venv/bin/python -W ignore show.py

#!/usr/bin/env bash
# flax 0.12.8, dm-haiku 0.0.17: norms of float32 inputs whose mean is 1,000 times their deviation
# are off by 0.37 and more, at 3,000 times by thousands or NaN.
#
# Expected: mean 0 and deviation 1 to a few digits, as the formula and torch give (error 4e-4 at
#   1,000, 1e-3 at 3,000), and as haiku's and equinox's layer norms do.
# Seen: flax's batch and layer norms (linen and nnx, use_fast_variance) and haiku's batch norm take the
#   variance as E[x^2] - E[x]^2 in float32. At 1,000 the error is 0.37 (layer norm 1.9); at 3,000 flax
#   puts a variance below 0 to 0, which makes outputs of 1,000 and more, haiku takes its root: NaN.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'flax==0.12.8' 'dm-haiku==0.0.17' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

print("flax", flax.__version__, "dm-haiku", hk.__version__, "jax", jax.__version__)
standard = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")


def normalise(x, axis):
    x = x.astype("float64")
    return (x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True)


def run(make, x):
    function = hk.transform_with_state(make)
    params, state = function.init(jax.random.key(0), x)
    return function.apply(params, state, None, x)[0]


def linen(layer, x):
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mutable=["batch_stats"])[0]


found = {}
for mean in (0, 1000, 3000):
    x = standard + np.float32(mean)
    layers = {
        "flax.linen.BatchNorm": (linen(nn.BatchNorm(use_running_average=False), jnp.asarray(x)), 0),
        "flax.linen.LayerNorm": (linen(nn.LayerNorm(), jnp.asarray(x)), 1),
        "flax.nnx.BatchNorm": (nnx.BatchNorm(8, rngs=nnx.Rngs(0))(jnp.asarray(x)), 0),
        "haiku.BatchNorm": (
            run(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True), jnp.asarray(x)),
            0,
        ),
        "haiku.LayerNorm": (run(lambda x: hk.LayerNorm(-1, True, True)(x), jnp.asarray(x)), 1),
    }
    for name, (output, axis) in layers.items():
        error = np.abs(np.asarray(output) - normalise(x, axis)).max()
        print(f"mean {mean}, deviation 1, {name}: largest error {error:.3g}")
        found[name, mean] = error
flax_norms = ("flax.linen.BatchNorm", "flax.linen.LayerNorm", "flax.nnx.BatchNorm")
for name in (*flax_norms, "haiku.BatchNorm"):
    assert found[name, 0] < 1e-3 and found[name, 1000] > 0.3
    wrong = np.isnan if name == "haiku.BatchNorm" else (lambda error: error > 1000)
    assert wrong(found[name, 3000])
assert found["haiku.LayerNorm", 3000] < 1e-2
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# hgq2 0.2.0 with quantizers 1.2.2: stochastic rounding, S_RND and S_RND_CONV, rounds to nearest.
#
# Expected: the modes that the docstrings of both packages list beside RND and RND_CONV round at random while
#   training: 0.3 on a grid of whole numbers is 1 in 30 % of the cases, 0.3 on average; a seed generator
#   has to be given for it.
# Seen: they give what RND and RND_CONV give, 0 each time. The argument reaches the function that rounds, and
#   the lines there that would add noise are commented out. There is no warning.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'hgq2==0.2.0' 'quantizers==1.2.2' 'keras==3.15.1' 'jax==0.10.2' \
  'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import os
from importlib.metadata import version

os.environ["KERAS_BACKEND"] = "jax"
import keras
import numpy as np
from hgq.quantizer import Quantizer
from quantizers import get_fixed_quantizer

print("hgq2", version("hgq2"), "quantizers", version("quantizers"))
VALUE, COUNT = 0.3, 20_000
values = np.full((1, COUNT), VALUE, np.float32)
floors = np.floor(values + np.random.default_rng(0).random(values.shape))
print(f"{VALUE} rounded at random, by the formula: {floors.mean():.3f} on average")
assert abs(floors.mean() - VALUE) < 0.02
for mode in ("RND", "S_RND", "RND_CONV", "S_RND_CONV"):
    function = get_fixed_quantizer(mode, "SAT")
    seeds = keras.random.SeedGenerator(0)
    plain = np.asarray(function(values, 1.0, 3.0, 0.0, training=True, seed_gen=seeds))
    layer = Quantizer(
        "kif", "datalane", i0=3, f0=0, round_mode=mode, overflow_mode="SAT", heterogeneous_axis=()
    )
    layer.build(values.shape)
    trained = np.asarray(layer(values, training=True))
    print(f"{mode}: {plain.mean():.3f} by quantizers, {trained.mean():.3f} by a layer of hgq2 in training")
    assert not plain.any() and not trained.any()
PYTHON
JAX_PLATFORMS=cpu venv/bin/python show.py

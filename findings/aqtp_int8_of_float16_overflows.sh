#!/usr/bin/env bash
# aqtp 0.9.0: int8 products of float16 arrays are infinite.
#
# Expected: an int8 product is summed in int32, scaled, and then rounded to the layer's dtype: with inputs and outputs
#   near 1 a float16 Dense layer is as exact in int8 as a float32 or bfloat16 one, 1 %.
# Seen: the int32 sum becomes float16 before it is scaled. Two values at the ends of int8's range contribute
#   16,129, and float16 ends at 65,504: of the outputs of 64 inputs some are infinite, of 512 inputs a fifth,
#   though no output is above 4. bfloat16 has float32's range and hides it. Keras refuses int8 in float16.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'aqtp==0.9.0' 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import jax
import jax.numpy as jnp
from aqt.jax.v2 import config
from aqt.jax.v2.flax import aqt_flax
from flax import linen as nn

print("aqtp", version("aqtp"))


def int8():
    return aqt_flax.AqtDotGeneral(config.config_v4(fwd_bits=8))


for width in (64, 512):
    inputs = jax.random.normal(jax.random.key(0), (32, width))
    exact, variables = nn.Dense(16).init_with_output(jax.random.key(1), inputs)
    print(f"{width} inputs, {exact.size} outputs of up to {jnp.abs(exact).max():.1f}:")
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        layer = nn.Dense(16, dtype=dtype, dot_general_cls=int8)
        outputs = layer.apply(variables, inputs, rngs={"params": jax.random.key(2)})
        outputs = outputs.astype(jnp.float32)
        finite = jnp.isfinite(outputs)
        error = jnp.linalg.norm((outputs - exact)[finite]) / jnp.linalg.norm(exact[finite])
        infinite = int((~finite).sum())
        print(f"  {dtype.__name__}: {infinite} are infinite; error of the others {error:.4f}")
        assert error < 0.02
        assert (infinite > 0) == (dtype == jnp.float16)
PYTHON
JAX_PLATFORMS=cpu venv/bin/python show.py

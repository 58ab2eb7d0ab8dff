#!/usr/bin/env bash
# flax 0.12.8: WeightNorm around a layer throws the norms of its initialisation away.
#
# Expected: a reparametrisation, kernel = scale * v / |v|: the scale begins as the norm of the kernel
#   that the layer's initialiser made, and the function is what it would be without, as in torch's
#   weight_norm and equinox's WeightNorm.
# Seen: the scale begins as 1 and the kernel itself is kept as v / |v|: any initialiser gives columns
#   of norm 1. A Dense made with deviation 5 becomes the same as one of 0.01, and outputs shrink or
#   grow by that.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

print("flax", flax.__version__)
x = jax.random.normal(jax.random.key(1), (64, 8))
spread = []
for deviation in (0.01, 1.0, 5.0):
    init = nn.initializers.normal(deviation)
    plain = nn.Dense(4, kernel_init=init)
    normed = nn.WeightNorm(nn.Dense(4, kernel_init=init))
    outputs = [m.apply(m.init(jax.random.key(0), x), x).std().item() for m in (plain, normed)]
    params = normed.init(jax.random.key(0), x)["params"]
    norms = jnp.linalg.norm(params["layer_instance"]["kernel"], axis=0)
    scale = params["layer_instance/kernel/scale"]
    print(f"initial deviation {deviation}: std {outputs[0]:.3f}, with WeightNorm {outputs[1]:.3f}")
    assert jnp.allclose(scale, 1) and jnp.allclose(norms, 1, atol=1e-4)
    spread.append(outputs[1])
assert max(spread) < 1.01 * min(spread)
PYTHON
venv/bin/python show.py

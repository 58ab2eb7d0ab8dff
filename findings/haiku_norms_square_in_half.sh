#!/usr/bin/env bash
# dm-haiku 0.0.17 with jax 0.10.0: norms of float16 rows square in float16, and lose wide rows.
#
# Expected: as in Flax, Equinox and torch, a norm of float16 inputs computes its variance in float32;
#   jax itself sums halves so.
# Seen: jnp.var squares in the dtype of its input and sums in float32. From |x - mean| = 256 on the
#   variance is inf, and hk.LayerNorm, hk.RMSNorm, hk.GroupNorm and jax.nn.standardize give 0 for
#   whole rows: finite, no message. Flax's and Equinox's of the same rows are right.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'dm-haiku==0.0.17' 'flax==0.12.8' 'equinox==0.13.8' \
  'jax==0.10.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import equinox
import flax.linen
import haiku
import jax
import jax.numpy as jnp
import numpy as np

N = 512
key = jax.random.PRNGKey(0)


def of_haiku(make):
    def run(x):
        net = haiku.transform(lambda each: make()(each))
        return net.apply(net.init(key, x), None, x)

    return run


def of_flax(module):
    return lambda x: module.apply(module.init(key, x), x)


NORMS = {
    "hk.LayerNorm": of_haiku(lambda: haiku.LayerNorm(-1, True, True)),
    "hk.RMSNorm": of_haiku(lambda: haiku.RMSNorm(-1)),
    "hk.GroupNorm": of_haiku(lambda: haiku.GroupNorm(4)),
    "jax.nn.standardize": jax.nn.standardize,
    "flax LayerNorm": of_flax(flax.linen.LayerNorm(dtype=jnp.float16)),
    "flax RMSNorm": of_flax(flax.linen.RMSNorm(dtype=jnp.float16)),
    "equinox LayerNorm": jax.vmap(equinox.nn.LayerNorm(N, dtype=jnp.float16)),
    "equinox RMSNorm": jax.vmap(equinox.nn.RMSNorm(N, dtype=jnp.float16)),
}
rows = np.random.default_rng(0).standard_normal((8, N))
for size in (1, 1000):
    x = jnp.asarray(size * rows, jnp.float16)
    print(f"deviation {size}: jnp.var {float(jnp.var(x)):.3g}, jnp.mean {float(jnp.mean(x)):.3g}")
    assert jnp.isinf(jnp.var(x)) == (size == 1000) and jnp.isfinite(jnp.mean(x))
    for name, norm in NORMS.items():
        y = np.asarray(norm(x), float)
        print(f"  {name}: deviation of the output {y.std():.3f}")
        fails = size == 1000 and name.startswith(("hk", "jax"))
        assert (y == 0).all() if fails else abs(y.std() - 1) < 0.01
PYTHON
JAX_PLATFORMS=cpu venv/bin/python -W ignore show.py

#!/usr/bin/env bash
# optax 0.2.8: clip_by_global_norm makes zeros of float16 gradients that are longer than 256.
#
# Expected: clipping to norm 1 gives gradients of norm 1, in any dtype, or NaN where something
#   overflows, which apply_if_finite would catch.
# Seen: global_norm squares and sums in the dtype of the gradients. From a norm of 256 on, the usual
#   size before clipping, and under a loss scale always, it is inf; gradients divided by inf are 0.
#   The updates are finite, so apply_if_finite counts no error, and SGD with momentum stands still.
#   In bfloat16 and float32 the norm is 1.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'optax==0.2.8' 'jax==0.10.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import jax.numpy as jnp
import numpy as np
import optax

values = np.random.default_rng(0).standard_normal(10_000)
optimizer = optax.apply_if_finite(
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9)), 5
)
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for size in (1, 3):
        gradients = {"w": jnp.asarray(size * values, dtype)}
        state = optimizer.init(gradients)
        updates, state = optimizer.update(gradients, state)
        length = float(np.linalg.norm(np.asarray(updates["w"], float)))
        print(
            f"{dtype.__name__}, gradients of norm {100 * size}: optax.global_norm "
            f"{float(optax.global_norm(gradients)):.4g}, updates of norm {length:.3f}, "
            f"{int(state.total_notfinite)} errors"
        )
        lost = dtype == jnp.float16 and size == 3
        assert (length == 0) if lost else abs(length - 1) < 0.02
        assert state.total_notfinite == 0
PYTHON
JAX_PLATFORMS=cpu venv/bin/python -W ignore show.py

#!/usr/bin/env bash
# optax 0.2.8: unit-wise norms of a one-dimensional convolution are taken over its taps alone.
#
# Expected: adaptive_grad_clip bounds each unit's gradient by that unit's weights. A unit of a kernel
#   (taps, inputs, outputs) is an output channel, reduced over axes (0, 1), as it is of a 2-d kernel; by
#   unitwise_norm's docstring, rank 3 is reduced over axes (0, 1, 2), as rank 4 is.
# Seen: rank 3 is reduced over axis 0 alone: an output channel of 3 taps and 64 inputs has 64 norms
#   of 3 values. A gradient whose norm is the clipping's share of each output channel's norm is cut,
#   by 23 % here; the same kernel with a spatial axis of size 1 (rank 4) is not touched.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'optax==0.2.8' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

SHARE = 0.1
kernel = jax.random.normal(jax.random.key(0), (3, 64, 8))
gradient = jax.random.normal(jax.random.key(1), kernel.shape)
by_output = {"axis": (0, 1), "keepdims": True}
gradient *= 0.99 * SHARE * jnp.linalg.norm(kernel, **by_output) / jnp.linalg.norm(gradient, **by_output)


def kept(weights, updates):
    """The share of a gradient's norm that adaptive_grad_clip leaves."""
    clip = optax.adaptive_grad_clip(SHARE)
    clipped, _ = clip.update(updates, clip.init(weights), weights)
    return float(jnp.linalg.norm(clipped.ravel()) / jnp.linalg.norm(updates.ravel()))


print("optax", optax.__version__)
norms = optax.transforms.unitwise_norm(kernel)
print("different norms of an output channel:", len(set(norms[0, :, 0].tolist())))
assert jnp.allclose(norms, jnp.linalg.norm(kernel, axis=0, keepdims=True), rtol=1e-5)
as_rank_3, as_rank_4 = kept(kernel, gradient), kept(kernel[:, None], gradient[:, None])
print(f"kept of the gradient's norm: rank 3 {as_rank_3:.3f}, rank 4 {as_rank_4:.3f}")
assert as_rank_3 < 0.9 and as_rank_4 == 1
PYTHON
venv/bin/python show.py

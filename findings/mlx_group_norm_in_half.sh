#!/usr/bin/env bash
# MLX 0.32.4 on the CPU: group and batch norms of float16 images give zeros, at ordinary sizes.
#
# Expected: all norms of mlx.nn sum in float32, as its fast layer and RMS norms do; and
#   GroupNorm(pytorch_compatible) chooses the order of channels, not the precision.
# Seen: mx.var sums squares in the dtype of its input, and what n values of deviation s make,
#   n s^2, is inf from 65,504 on. GroupNorm(8, 64) of 64 x 64 images is 0 from a deviation of 1.42 on,
#   and so is BatchNorm in training: finite, no message. With pytorch_compatible=True, which calls the
#   fast layer norm, and in LayerNorm and InstanceNorm the output is right at 20.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import mlx.core as mx
import mlx.nn as nn
import numpy as np

NORMS = {
    "GroupNorm": nn.GroupNorm(8, 64),
    "BatchNorm": nn.BatchNorm(64),
    "GroupNorm, pytorch_compatible": nn.GroupNorm(8, 64, pytorch_compatible=True),
    "InstanceNorm": nn.InstanceNorm(64),
    "LayerNorm": nn.LayerNorm(64),
}
images = np.random.default_rng(0).standard_normal((8, 64, 64, 64))
for norm in NORMS.values():
    norm.set_dtype(mx.float16)
for size in (1, 2, 20):
    x = mx.array((size * images).astype(np.float16))
    print(f"deviation {size}: mx.var of channels {mx.var(x.reshape(-1, 64, 64), (0, 1)).max().item():.3g}")
    for name, norm in NORMS.items():
        y = np.array(norm(x)).astype(float)
        print(f"  {name}: deviation of the output {y.std():.3f}")
        fails = size > 1 and name in ("GroupNorm", "BatchNorm")
        assert (y == 0).all() if fails else abs(y.std() - 1) < 0.01
PYTHON
venv/bin/python -W ignore show.py

#!/usr/bin/env bash
# torch 2.15.0 on a CPU: aminmax of each row takes many times as long as amin and amax together.
#
# Expected: one pass that finds both takes at most what two passes take, one for each, as it does for
#   the whole tensor; observers of quantisation are written with it for that reason.
# Seen: over all elements aminmax is as fast as both. Along the last dimension of (64, 16,384) float32
#   numbers it is about 20 times slower, with one thread; the values are the same.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import time

import torch

print("torch", torch.__version__.split("+")[0])
torch.set_num_threads(1)
x = torch.randn(64, 16_384)


def seconds(call):
    times = []
    for _ in range(30):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return sorted(times)[5]


for name, dims in (("all elements", {}), ("rows", {"dim": 1})):
    low, high = torch.aminmax(x, **dims)
    assert torch.equal(low, torch.amin(x, **dims)) and torch.equal(high, torch.amax(x, **dims))
    one = seconds(lambda: torch.aminmax(x, **dims))
    two = seconds(lambda: (torch.amin(x, **dims), torch.amax(x, **dims)))
    print(f"{name}: aminmax takes {one / two:.1f} times as long as amin and amax")
    assert one > 5 * two if dims else one < 2 * two
PYTHON
venv/bin/python show.py

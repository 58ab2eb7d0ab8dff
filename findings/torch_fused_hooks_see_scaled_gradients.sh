#!/usr/bin/env bash
# torch 2.15.0: under a GradScaler the step hooks of a fused optimizer see scaled gradients, and fire
# for steps that are skipped.
#
# Expected: a step hook sees the gradient that the step takes, and is called when there is a step, as
#   with the same optimizer unfused: `scaler.step` unscales first, and leaves a non-finite step out.
# Seen: with fused=True the scaler hands its scale to the kernel. The pre-hook sees 1,024 for a gradient
#   of 1, and both hooks are called for the infinite step, which changes nothing. A hook that clips or
#   records norms is off by the scale, one that counts steps counts too many. After
#   `scaler.unscale_` the gradients are right, and the hooks still fire.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch
from torch import nn


def watch(fused: bool, unscale: bool = False) -> tuple[list[float], float]:
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for gradient in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(weight * gradient).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return seen, weight.item()


print("torch", torch.__version__.split("+")[0])
infinity = float("inf")
for fused, unscale, expected in (
    (False, False, [1.0]),
    (True, False, [1024.0, infinity]),
    (True, True, [1.0, infinity]),
):
    seen, weight = watch(fused, unscale)
    print(f"fused={fused}, unscale_ first: {unscale}: hooks saw {seen}, the weight is {weight:.1f}")
    assert seen == expected
    assert abs(weight - 0.9) < 1e-6
PYTHON
venv/bin/python show.py

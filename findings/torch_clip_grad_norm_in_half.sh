#!/usr/bin/env bash
# torch 2.15.0: clip_grad_norm_ sets every gradient of a float16 model to zero where their norm is
# above 65,504, although each gradient is finite.
#
# Expected: gradients of norm 126,491 are scaled to norm 1: the norm is summed in float32, or its
#   overflow is an error, since error_if_nonfinite is for gradients that are not finite.
# Seen: the norms of the tensors are finite (63,232), that of these norms is taken in float16 and is
#   inf, the factor is 1 / inf, and all gradients become 0: the step is lost without a word. With
#   foreach or without.
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

print("torch", torch.__version__.split("+")[0])
for foreach in (True, False):
    parameters = [nn.Parameter(torch.zeros(1000, dtype=torch.float16)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((1000,), 2000.0, dtype=torch.float16)
    right = float(torch.cat([parameter.grad for parameter in parameters]).double().norm())
    norm = float(nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach))
    left = max(float(parameter.grad.abs().max()) for parameter in parameters)
    print(f"foreach={foreach}: norm {norm}, in float64 {right:.0f}; largest gradient left {left}")
    assert norm == float("inf") and left == 0
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# torch-optimizer 0.3.0: SGDW's weight decay subtracts one number from every weight.
#
# Expected: SGD with decoupled weight decay (Loshchilov and Hutter), as its docstring says: a step
#   with gradient 0 multiplies each weight by 1 - lr * weight_decay, whatever its sign.
# Seen: each weight, positive, negative or 0, is lessened by lr * weight_decay. Positive weights
#   shrink, negative ones grow, weights of 0 leave it; a norm layer's weight of 1 and a bias shift
#   alike. No error, no warning.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch-optimizer==0.3.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
import torch_optimizer

print("torch-optimizer", version("torch-optimizer"))
LR, DECAY = 0.1, 0.1
start = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
weight = torch.nn.Parameter(start.clone())
optimizer = torch_optimizer.SGDW([weight], lr=LR, weight_decay=DECAY)
weight.grad = torch.zeros(5)
optimizer.step()
print("before ", start.tolist())
print("after  ", [round(x, 4) for x in weight.tolist()])
print("decayed", [round(x, 4) for x in (start * (1 - LR * DECAY)).tolist()])
assert torch.allclose(weight.detach(), start - LR * DECAY)
for _ in range(1000):
    optimizer.step()
print("after 1,001 steps without a gradient", [round(x, 2) for x in weight.tolist()])
assert torch.allclose(weight.detach(), start - 1001 * LR * DECAY, atol=1e-3)
PYTHON
venv/bin/python show.py

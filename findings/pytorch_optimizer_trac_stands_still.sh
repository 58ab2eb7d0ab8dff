#!/usr/bin/env bash
# pytorch_optimizer 4.1.0: a model that TRAC tunes never leaves its initial weights.
#
# Expected: TRAC (Muppidi et al.) starts with a scale of 1e-8 and raises it while the base optimizer's
#   steps help: after some hundred steps on a quadratic the weights have moved.
# Seen: not by one bit in 1,000 steps, with SGD and with AdamW as the base. The scale is learned from
#   the product of the gradient with the way gone so far, which is 0 at the start; so the scale stays
#   0, and with it the way. No warning; the base optimizers alone reach the minimum.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'pytorch_optimizer==4.1.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
from pytorch_optimizer import TRAC

print("pytorch_optimizer", version("pytorch_optimizer"))
for base, lr in ((torch.optim.SGD, 0.1), (torch.optim.AdamW, 0.01)):
    for tuned in (False, True):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = base([weight], lr=lr, weight_decay=0.0)
        optimizer = TRAC(optimizer) if tuned else optimizer
        for _ in range(1000):
            optimizer.zero_grad()
            (weight - 3).square().sum().backward()
            optimizer.step()
        end, name = weight.tolist(), " in TRAC" if tuned else ""
        print(f"{base.__name__}{name}: from 1 to {end[0]:.4f}, minimum at 3")
        assert end == [1.0] * 4 if tuned else abs(end[0] - 3) < 1e-2
PYTHON
venv/bin/python show.py

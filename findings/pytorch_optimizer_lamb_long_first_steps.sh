#!/usr/bin/env bash
# pytorch_optimizer 4.1.0: the first step of Lamb is ten times as long as lr says.
#
# Expected: LAMB normalises each step, so that a weight turns by lr from the first step on; without
#   bias correction, as the documentation says of the default, or with it.
# Seen: what is normalised is divided by 1 - beta1 ** t afterwards. The steps of a 64 x 64 linear
#   layer are 10, 5.3, 3.7, 2.9, 2.4, 2.1 times lr of its norm, and 1.02 after 40: 26 lr too far in
#   the first 20. No argument changes it.
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
from pytorch_optimizer import Lamb

print("pytorch_optimizer", version("pytorch_optimizer"), "torch", version("torch"))
torch.manual_seed(0)
weight = torch.nn.Linear(64, 64).weight
optimizer = Lamb([weight], lr=1e-4)
for step in range(1, 41):
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    share = ((weight.detach() - before).norm() / before.norm()).item() / 1e-4
    if step <= 6 or step == 40:
        print(f"step {step}: {share:.3f} lr of its norm")
    assert abs(share * (1 - 0.9**step) - 1) < 1e-2
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# timm 1.0.31: corrected weight decay of a parameter group with its own learning rate is too small.
#
# Expected: the decay of a step is wd * lr * (lr / max lr), with lr and max lr of the group. At the
#   peak of its schedule a group decays by wd * lr, as without the correction; so does each group of
#   layer-wise learning rates.
# Seen: max lr is that of the whole optimizer. A group at a tenth of it decays at its own peak by a
#   hundredth of the other's, wd * lr / 10, and at 0.75 ** 12 of it, as deep in a network with layer
#   decay, by 3 % of wd * lr. So with adamc, sgdc, lionc and lapropc alike.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'timm==1.0.31' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
from timm.optim import create_optimizer_v2

print("timm", version("timm"), "torch", version("torch"))
LR, DECAY = 1e-2, 0.1
for name in ("adamw", "adamc", "sgdc", "lionc", "lapropc"):
    for scale in (1.0, 0.1, 0.75**12):
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
        groups = [{"params": [weight], "lr": LR * scale}]
        optimizer = create_optimizer_v2(groups, opt=name, lr=LR, weight_decay=DECAY)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        share = (1 - weight.mean().item()) / (DECAY * LR * scale)
        print(f"{name}, group at {scale:.3f} of the learning rate: decays by {share:.3f} wd * lr")
        assert abs(share - (1.0 if name == "adamw" else scale)) < 1e-6
PYTHON
venv/bin/python show.py

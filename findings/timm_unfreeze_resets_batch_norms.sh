#!/usr/bin/env bash
# timm 1.0.31: freeze and unfreeze of a batch norm give back another one.
#
# Expected: after unfreeze the layer is what it was before freeze: momentum, mode, parameters.
# Seen: the new BatchNorm2d has the default momentum of 0.1, whatever it was, and is in training mode
#   in a network that is in evaluation, so that the next forward normalises by the batch and moves the
#   running statistics.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'timm==1.0.31' 'torch==2.15.0' 'numpy==2.4.6' 'torchvision==0.29.2'
cat >show.py <<'PYTHON'
import timm
import torch
from timm.utils import freeze, unfreeze
from torch import nn

print("timm", timm.__version__)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01)).eval()
images = torch.randn(8, 3, 8, 8)
before = net(images)
freeze(net)
frozen = net(images)
unfreeze(net)
after = net(images)
norm = net[1]
print(f"momentum 0.01, then {norm.momentum}; in training mode: False, then {norm.training}")
changes = [(output - before).abs().max().item() for output in (frozen, after)]
print(f"outputs of the network in evaluation changed by {changes[0]:.1g} and {changes[1]:.2g}")
assert not net.training and norm.training and norm.momentum == 0.1
assert changes[0] < 1e-5 and changes[1] > 0.1
PYTHON
venv/bin/python show.py

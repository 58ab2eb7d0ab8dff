#!/usr/bin/env bash
# timm 1.0.31: param_groups_weight_decay gives weight decay to the gains of torch's weight norm.
#
# Expected: the group without decay holds what is one number a channel (norms, biases, gains), since
#   decaying a gain changes the function, as decaying a norm's weight does.
# Seen: the group is chosen by the number of dimensions, and a gain of weight norm has as many as its
#   weight, (8, 1, 1, 1) for a convolution. It decays, and so does the direction, which has no effect
#   on the function. In 100 steps without a gradient the layer's output shrinks to 37 %.
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
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

print("timm", timm.__version__)
torch.manual_seed(0)
net = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8))
groups = param_groups_weight_decay(net, weight_decay=0.1)
for group in groups:
    names = [name for name, p in net.named_parameters() if any(p is q for q in group["params"])]
    print("weight decay", group["weight_decay"], names)
gain = net[0].parametrizations.weight.original0
decayed = next(group["params"] for group in groups if group["weight_decay"])
assert gain.shape == (8, 1, 1, 1) and any(p is gain for p in decayed)
assert not any(p is net[1].weight for p in decayed)
images = torch.randn(4, 3, 8, 8)
before = net[0](images).std().item()
optimizer = torch.optim.SGD(groups, lr=0.1)
for _ in range(100):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
after = net[0](images).std().item()
print(f"std of the convolution: {before:.4f}, after 100 steps without a gradient {after:.4f}")
assert abs(after / before - 0.99**100) < 1e-3
PYTHON
venv/bin/python show.py

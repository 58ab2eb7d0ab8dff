#!/usr/bin/env bash
# optimum-quanto 0.2.7: Calibration's momentum is not that of the input scales.
#
# Expected: Calibration(momentum=0) gives every layer the scales of the last batch, for its input and its output;
#   momentum=0.99 the mean of many batches, for both.
# Seen: output scales follow it. Those of inputs, which are computed right beside, move by 0.9 whatever it
#   is: after ten batches of shrinking range an input's scale is that of momentum 0.9 to the last bit.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'optimum-quanto==0.2.7' 'torch==2.15.0' 'numpy==2.4.6' 'ninja'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
from optimum.quanto import Calibration, qint8, quantize
from torch import nn

print("optimum-quanto", version("optimum-quanto"))
torch.manual_seed(0)
layer = nn.Linear(16, 16).requires_grad_(False)
batches = [torch.randn(64, 16) * (10 - step) for step in range(10)]


def average(values, momentum):
    scale = values[0]
    for value in values[1:]:
        scale = momentum * scale + (1 - momentum) * value
    return scale.item()


inputs = [batch.abs().max() / 127 for batch in batches]
outputs = [layer(batch).abs().max() / 127 for batch in batches]
for momentum in (0.9, 0.0, 0.99):
    net = nn.Sequential(nn.Linear(16, 16), nn.Identity()).requires_grad_(False)
    net[0].load_state_dict(layer.state_dict())
    quantize(net, weights=qint8, activations=qint8)
    with Calibration(momentum=momentum):
        for batch in batches:
            net(batch)
    scale, expected, fixed = net[0].input_scale.item(), average(inputs, momentum), average(inputs, 0.9)
    out = net[0].output_scale.item()
    print(f"momentum {momentum}: scale of the input {scale:.4f}, expected {expected:.4f}; of the output", end=" ")
    print(f"{out:.4f}, expected {average(outputs, momentum):.4f}")
    assert abs(scale / fixed - 1) < 1e-5
    assert abs(out / average(outputs, momentum) - 1) < 0.05
PYTHON
venv/bin/python show.py

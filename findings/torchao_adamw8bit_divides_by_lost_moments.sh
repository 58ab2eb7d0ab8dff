#!/usr/bin/env bash
# torchao 0.18.0: AdamW8bit takes steps of hundreds of learning rates, and ends in NaN where gradients are larger.
#
# Expected: Adam moves a weight by a few learning rates at most, whatever the scale of its gradients: a loss that
#   is summed over a batch of 64 trains as its mean does, in 8 bits as in 32.
# Seen: AdamW and AdamW4bit do so. AdamW8bit stores second moments in a map that has a 0, for all below some
#   millionth of the largest in a block of 256. Where a ReLU leaves a weight without a gradient in the
#   next step, its first moment is still there and is divided by eps. With the mean of the losses single
#   weights move by hundreds of learning rates in one step, which the loss hides; with their sum, 64
#   times as much, the network is NaN within 200 steps. AdamW4bit's map leaves 0 out.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torchao==0.18.0' 'torch==2.15.0' 'numpy==2.4.6' 'scikit-learn==1.9.1'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
from sklearn.datasets import load_digits
from torch import nn
from torchao.optim import AdamW4bit, AdamW8bit

print("torchao", version("torchao"))
torch.set_num_threads(1)
pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
RATE, STEPS = 1e-3, 200


def run(optimizer_class, reduction):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer, largest = optimizer_class(net.parameters(), lr=RATE), 0.0
    for _ in range(STEPS):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        batch = torch.randint(0, 1_400, (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(pixels[batch]), labels[batch], reduction=reduction)
        loss.backward()
        optimizer.step()
        moves = [(a - b).abs().max().item() for a, b in zip(net.parameters(), before, strict=True)]
        largest = max(largest, *moves)
    accuracy = (net(pixels[1_400:]).argmax(1) == labels[1_400:]).float().mean().item()
    finite = all(parameter.isfinite().all() for parameter in net.parameters())
    print(
        f"{optimizer_class.__name__}, {reduction}: the largest step of a weight is {largest / RATE:.0f}"
        f" learning rates; finite at the end: {finite}; accuracy {accuracy:.3f}"
    )
    return largest / RATE, finite, accuracy


for reduction in ("mean", "sum"):
    for optimizer_class in (torch.optim.AdamW, AdamW4bit, AdamW8bit):
        largest, finite, accuracy = run(optimizer_class, reduction)
        if optimizer_class is not AdamW8bit:
            assert largest < 20 and finite and accuracy > 0.85
        elif reduction == "mean":
            assert largest > 100 and finite and accuracy > 0.85
        else:
            assert not finite and accuracy < 0.2
PYTHON
venv/bin/python -W ignore show.py

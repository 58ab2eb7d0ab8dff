#!/usr/bin/env bash
# torch 2.15.0: a layer under nn.utils.spectral_norm that is evaluated before it was trained has a
# spectral norm of hundreds, not 1.
#
# Expected: after spectral_norm(layer) the largest singular value of the weight is 1, or near it for
#   want of iterations, from the first forward on: a network can be evaluated, exported or compared
#   before its first training step.
# Seen: the vectors of the power iteration are random and are not iterated in evaluation, so the
#   weight is divided by uᵀ W v of two random vectors, which is near zero: 544 for a linear layer of
#   256. One forward in training mode brings it to 1.6, ten to 1.1. The newer
#   nn.utils.parametrizations.spectral_norm iterates 15 times when it is applied: 1.01.
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
from torch.nn.utils import parametrizations

WIDTH = 256


@torch.no_grad()
def largest_singular_value(layer):
    return float(torch.linalg.matrix_norm(layer.eval()(torch.eye(WIDTH)), 2))


print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
layer = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))
seen = {"before training": largest_singular_value(layer)}
for count in range(1, 11):
    layer.train()(torch.eye(WIDTH))
    seen[f"after {count} forwards"] = largest_singular_value(layer)
newer = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))
seen["newer one, before training"] = largest_singular_value(newer)
for name in ("before training", "after 1 forwards", "after 10 forwards", "newer one, before training"):
    print(f"{name}: largest singular value {seen[name]:.3g}")
assert seen["before training"] > 100
assert seen["after 10 forwards"] < 1.2 and seen["newer one, before training"] < 1.05
PYTHON
venv/bin/python show.py

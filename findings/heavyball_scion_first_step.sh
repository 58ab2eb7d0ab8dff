#!/usr/bin/env bash
# heavyball 3.2.1: the first step of Scion replaces the weights by scaled ones, at any learning rate.
#
# Expected: the first step changes weights by about lr; with lr=0 not at all. A network that was
#   trained before starts from what it was.
# Seen: each matrix is scaled to a spectral norm of sqrt(rows / columns) in the first step, at lr=0
#   and lr=1e-6 alike: a random 16 x 8 matrix keeps 34 % of its norm, one of norm 100 times that
#   0.34 %. Nothing is said. Fine where a norm layer follows, not elsewhere.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'heavyball==3.2.1' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

warnings.filterwarnings("ignore")
from importlib.metadata import version

import heavyball
import torch

print("heavyball", version("heavyball"))
for factor in (1.0, 100.0):
    for lr in (0.0, 1e-6):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(factor * torch.randn(16, 8))
        before = weight.norm().item()
        optimizer = heavyball.Scion([weight], lr=lr)
        weight.grad = torch.randn(16, 8)
        optimizer.step()
        spectral = torch.linalg.matrix_norm(weight.detach(), 2).item()
        ratio = weight.norm().item() / before
        print(f"lr {lr}, norm {before:.2f}: after a step times {ratio:.4f}")
        print(f"    spectral norm {spectral:.5f}")
        assert abs(spectral - 2**0.5) < 1e-4 and ratio < 0.35 / factor
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# heavyball 3.2.1: Muon's Nesterov momentum, the default, is hardly any; the more beta1 the less.
#
# Expected: the update is orthogonalised from (1 - beta) g + beta m, m the average of gradients, as
#   by Muon's author and in torch. With uncorrelated gradients, beta = 0.9 and 48 x 32 matrices,
#   successive updates of torch.optim.Muon correlate by 0.55, and more with a larger beta.
# Seen: it is orthogonalised from g + m, in which g counts 1.1 and the one before it 0.09. Successive
#   updates correlate by 0.09, with beta1 = 0.95 by 0.05: each step goes almost along its own
#   gradient. With nesterov=False they correlate by 0.85.
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

print("heavyball", version("heavyball"), "torch", version("torch"))


def correlation(make):
    """Return that of an update with the one before it, over 150 steps."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 32))
    optimizer, updates = make([weight]), []
    for _ in range(200):
        before = weight.detach().clone()
        weight.grad = torch.randn(48, 32)
        optimizer.step()
        updates.append((weight.detach() - before).flatten())
    last = torch.nn.functional.normalize(torch.stack(updates[50:]), dim=1)
    return (last[1:] * last[:-1]).sum(1).mean().item()


OPTIMIZERS = {
    "torch, momentum 0.9": (lambda w: torch.optim.Muon(w, 1e-3, 0.0, 0.9), 0.55),
    "torch, momentum 0.95": (lambda w: torch.optim.Muon(w, 1e-3, 0.0, 0.95), 0.69),
    "heavyball, beta1 0.9": (lambda w: heavyball.Muon(w, 1e-3), 0.09),
    "heavyball, beta1 0.95": (lambda w: heavyball.Muon(w, 1e-3, (0.95, 0.99)), 0.05),
    "heavyball, nesterov=False": (lambda w: heavyball.Muon(w, 1e-3, nesterov=False), 0.85),
}
for name, (make, expected) in OPTIMIZERS.items():
    found = correlation(make)
    print(f"{name}: {found:.2f}")
    assert abs(found - expected) < 0.05
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# pytorch_optimizer 4.1.0: Lamb takes the norm of every weight above 10 for 10.
#
# Expected: LAMB's step is lr times the weight's norm, whatever that is, so that each layer turns by
#   about lr; a cap of the norm would be an argument.
# Seen: up to a norm of 10 it is, above it the step is lr * 10: a 512 x 512 linear layer with torch's
#   own initialisation, of norm 13, turns by 0.77 lr, an embedding of 8,000 x 64 by 0.014 lr. No
#   argument of the constructor changes it, only the class attribute `clamp`.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'pytorch_optimizer==4.1.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import inspect
from importlib.metadata import version

import torch
from pytorch_optimizer import Lamb

print("pytorch_optimizer", version("pytorch_optimizer"), "torch", version("torch"))
assert "clamp" not in inspect.signature(Lamb).parameters and Lamb.clamp == 10.0
torch.manual_seed(0)
LAYERS = {
    "linear 64 x 64": torch.nn.Linear(64, 64),
    "linear 512 x 512": torch.nn.Linear(512, 512),
    "embedding 8000 x 64": torch.nn.Embedding(8000, 64),
}
for name, layer in LAYERS.items():
    weight, optimizer = layer.weight, Lamb([layer.weight], lr=1e-4)
    for _ in range(100):  # the first steps are longer
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    norm = before.norm().item()
    share = (weight.detach() - before).norm().item() / norm / 1e-4
    print(f"{name}, norm {norm:.1f}: steps by {share:.4f} lr of its norm")
    assert abs(share / min(1.0, 10.0 / norm) - 1) < 2e-2
PYTHON
venv/bin/python show.py

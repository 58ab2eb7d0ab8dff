#!/usr/bin/env bash
# torch 2.15.0: torch.linalg.vector_norm on a CPU sums in one running float32 per channel, hundreds
# of times less exactly than abs().sum() of the same tensor.
#
# Expected: a norm over the dimensions that a batch norm reduces is as exact as torch.sum, which adds
#   in a cascade: about 4e-7 relative for a million values a channel.
# Seen: 2e-5 for p = 1 and 4e-5 for p = 2 of 1,048,576 values a channel, and 7e-5 for p = 3; the error
#   grows with the number of values. A global gradient norm or the norm of a large embedding is of
#   this kind.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch

print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x, dims = torch.rand(256, 4, 64, 64) + 0.5, (0, 2, 3)
ways = {
    1: x.abs().sum(dims),
    2: x.square().sum(dims).sqrt(),
    3: x.pow(3).sum(dims).pow(1 / 3),
}
for p, by_sum in ways.items():
    right = x.double().pow(p).sum(dims).pow(1 / p)
    errors = [
        float(((found.double() - right) / right).abs().max())
        for found in (torch.linalg.vector_norm(x, p, dims), by_sum)
    ]
    print(f"p = {p}: relative error {errors[0]:.1e}, by torch.sum {errors[1]:.1e}")
    assert errors[0] > 1e-5 and errors[1] < 2e-6
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# tinygrad 0.14.0: fused=True makes LAMB and LARS take the whole network for one layer.
#
# Expected: fusing saves kernels and changes no step, as in torch, in apex and in tinygrad's own Adam;
#   Muon, which needs matrices, refuses it. In LAMB each layer turns by lr, in LARS by lr * tcoef.
# Seen: all parameters are laid end to end, and one trust ratio is taken of that. Beside an embedding
#   of deviation 1 a linear layer of deviation 0.02 moves by 40 times lr of its norm: at lr = 0.01 by
#   two fifths in the first step. Adam's steps are the same. FUSE_OPTIM=1 does this to any program.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'tinygrad==0.14.0'
cat >show.py <<'PYTHON'
import math
import random

from tinygrad import Tensor
from tinygrad.nn.optim import LAMB, LARS, Adam

N, RATE = 8, 0.01
DEVIATIONS = {"embedding": 1.0, "linear": 0.02}
OPTIMIZERS = {
    "LAMB": lambda weights, fused: LAMB(weights, lr=RATE, fused=fused),
    "LARS": lambda weights, fused: LARS(weights, lr=RATE, weight_decay=0, tcoef=1, fused=fused),
    "Adam": lambda weights, fused: Adam(weights, lr=RATE, fused=fused),
}


def matrix(deviation):
    return [[random.gauss(0, deviation) for _ in range(N)] for _ in range(N)]


def length(rows):
    return math.sqrt(sum(value * value for row in rows for value in row))


def turns(name, fused):
    random.seed(0)
    values = [matrix(deviation) for deviation in DEVIATIONS.values()]
    weights = [Tensor(value).realize() for value in values]
    optimizer = OPTIMIZERS[name](weights, fused)
    for weight in weights:
        weight.grad = Tensor(matrix(1)).realize()
    optimizer.step()
    moved = [(weight - Tensor(value)).tolist() for weight, value in zip(weights, values)]
    return [length(move) / length(value) / RATE for move, value in zip(moved, values)]


for name in OPTIMIZERS:
    plain, fused = turns(name, False), turns(name, True)
    for layer, each, together in zip(DEVIATIONS, plain, fused):
        print(f"{name}, {layer}: the first step is {each:.2f} lr of its norm, fused {together:.2f}")
    if name == "Adam":
        assert all(abs(a / b - 1) < 0.01 for a, b in zip(plain, fused))
    else:
        assert all(abs(each - 1) < 0.01 for each in plain)
        assert fused[0] < 0.9 and fused[1] > 25
PYTHON
TRAINING=1 PARALLEL=0 DEV=PYTHON venv/bin/python -W ignore show.py

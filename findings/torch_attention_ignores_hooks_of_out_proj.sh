#!/usr/bin/env bash
# torch 2.15.0: pruning or the older weight_norm on the output projection of nn.MultiheadAttention
# leaves a loaded network on the weights that it was made with.
#
# Expected: torch.nn.utils.prune and torch.nn.utils.weight_norm keep `weight` up to date for any
#   nn.Linear: after load_state_dict(strict=True) two networks compute the same.
# Seen: both recompute `weight` in a hook before the layer's forward, and nn.MultiheadAttention never
#   calls out_proj's: it passes out_proj.weight on. So after loading, the weight is still that of the
#   random start, without a word, and training raises in its first or second step. The newer
#   parametrizations.weight_norm, which recomputes when the attribute is read, is right.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

warnings.filterwarnings("ignore", category=FutureWarning)
WAYS = {
    "prune.l1_unstructured": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), False),
    "weight_norm": (nn.utils.weight_norm, False),
    "parametrizations.weight_norm": (parametrizations.weight_norm, True),
}


def make_attention(seed, change):
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    nn.init.normal_(attention.out_proj.weight)
    change(attention.out_proj)
    return attention


def trains(attention, x):
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.01)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            attention.train()(x, x, x)[0].square().mean().backward()
            optimizer.step()
    except RuntimeError:
        return False
    return True


print("torch", torch.__version__.split("+")[0])
x = torch.randn(2, 5, 16)
for name, (change, is_right) in WAYS.items():
    one, other = make_attention(0, change), make_attention(1, change)
    print(name, other.load_state_dict(one.state_dict()), end=": ")
    with torch.no_grad():
        outputs = [attention.eval()(x, x, x)[0] for attention in (one, other)]
    off, trained = float((outputs[0] - outputs[1]).abs().max()), trains(other, x)
    print(f"evaluation differs by {off:.2g}; three steps of training: {'done' if trained else 'an error'}")
    assert trained == is_right and (off == 0 if is_right else off > 1)
PYTHON
venv/bin/python show.py

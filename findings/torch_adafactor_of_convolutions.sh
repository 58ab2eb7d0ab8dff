#!/usr/bin/env bash
# torch 2.15.0, transformers 5.24.0: Adafactor's second moment of a 1x1 convolution takes twice the
# memory of Adam's, and that of a 3x3 one two thirds of it.
#
# Expected: one value a row and one a column, as of a matrix: of a (256, 64, 1, 1) weight 320 values
#   for 16,384, that is 2 %. To save that memory is what Adafactor is for.
# Seen: rows and columns are those of the last two dimensions, whatever the others are, so of a
#   convolution those of its kernel: (256, 64, 1, 1) keeps 32,768 values, (64, 64, 3, 3) 24,576 for
#   36,864. A linear layer of (256, 64) keeps 320. timm's Adafactor takes the first two instead.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'transformers==5.24.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
from importlib.metadata import version

import torch
from transformers.optimization import Adafactor

print("torch", version("torch"), "transformers", version("transformers"))
KEPT = {(256, 64): 320, (256, 64, 1, 1): 32_768, (64, 64, 3, 3): 24_576}
for shape, expected in KEPT.items():
    for make in (
        lambda weight: torch.optim.Adafactor([weight]),
        lambda weight: Adafactor([weight], lr=1e-3, relative_step=False),
    ):
        weight = torch.nn.Parameter(torch.randn(shape))
        optimizer = make(weight)
        weight.grad = torch.randn(shape)
        optimizer.step()
        state = [x for x in optimizer.state[weight].values() if torch.is_tensor(x) and x.dim()]
        kept = sum(x.numel() for x in state)
        of = type(optimizer).__module__.partition(".")[0]
        print(f"{of}, weight {shape} of {weight.numel()}: {kept} values kept")
        assert kept == expected
PYTHON
venv/bin/python show.py

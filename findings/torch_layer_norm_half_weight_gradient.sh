#!/usr/bin/env bash
# torch 2.15.0: nn.LayerNorm in 16 bits on a CPU sums its weight's gradient in 16 bits.
#
# Expected: dweight = Σ g · x̂ over the rows, summed in float32 and rounded once at the end, as a
#   matrix product does and as nn.BatchNorm2d does here: the error is half a unit in the last place
#   of the result, however many rows there are.
# Seen: the error grows with the number of rows, to tens of times that rounding: at 4,096 rows of 64,
#   bfloat16 is off by 8.6 where the largest value is 178 (rounding alone: 0.3), float16 by 1.5 (0.05).
#   The bias's gradient likewise. nn.BatchNorm1d on the same numbers is off by no more than rounding.
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

ROWS, WIDTH = 4096, 64


def errors(make, x, g, dtype):
    """The error of the weight's gradient, that of rounding it once, and its largest value."""
    layer, exact = make(WIDTH).to(dtype), make(WIDTH).double()
    layer(x.to(dtype)).backward(g.to(dtype))
    exact(x.to(dtype).double()).backward(g.to(dtype).double())
    right = exact.weight.grad
    rounded = right.to(dtype).double()
    found = layer.weight.grad.double()
    return [float(v.abs().max()) for v in (found - right, rounded - right, right)]


print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x, g = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
for dtype in (torch.bfloat16, torch.float16):
    for make, is_summed_in_half in ((nn.LayerNorm, True), (nn.BatchNorm1d, False)):
        error, rounding, largest = errors(make, x, g, dtype)
        print(f"{make.__name__}, {dtype}: off by {error:.3g}, rounding {rounding:.3g}, of {largest:.4g}")
        assert (error > 8 * rounding) == is_summed_in_half
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# torch 2.15.0: second derivatives through weight_norm are wrong, without an error (CPU, float64).
#
# Expected: a gradient penalty through torch.nn.utils.parametrizations.weight_norm, as WGAN-GP and R1
#   use it, has the derivative of the formula w = g v / ‖v‖; gradgradcheck passes.
# Seen: first derivatives are right. Second ones differ in the first digit, and gradgradcheck fails:
#   the derivative of the backward pass takes the norms that it saved for constants. The same holds
#   for the older torch.nn.utils.weight_norm, which calls the same operator. With dim=1 of a weight
#   with three dimensions, which the fused operator does not serve, they are right.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import math
import warnings

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

warnings.filterwarnings("ignore")


def by_formula(v, g, dim):
    others = [d for d in range(v.dim()) if d != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def penalties(layer, v, g, dim):
    """The derivative by v of a gradient's squared norm: of torch's layer, of the formula."""
    size, op = ((1, 4, 5), torch.conv1d) if v.dim() > 2 else ((1, 4), nn.functional.linear)
    x = torch.linspace(-1, 1, math.prod(size), dtype=v.dtype).view(size)
    found = []
    for output in (layer(x), op(x, by_formula(v, g, dim), layer.bias)):
        (first,) = torch.autograd.grad(output.square().sum(), v, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), v)
        found.append((first.detach(), second))
    return found


torch.manual_seed(0)
cases = {
    "linear": (nn.Linear(4, 3), 0, weight_norm, True),
    "linear, older weight_norm": (nn.Linear(4, 3), 0, nn.utils.weight_norm, True),
    "conv, dim=0": (nn.Conv1d(4, 3, 2), 0, weight_norm, True),
    "conv, dim=1": (nn.Conv1d(4, 3, 2), 1, weight_norm, False),
}
print("torch", torch.__version__.split("+")[0])
for name, (layer, dim, normalise, is_wrong) in cases.items():
    layer = normalise(layer.double(), dim=dim)
    if normalise is weight_norm:
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    else:
        g, v = layer.weight_g, layer.weight_v
    (first, second), (right_first, right_second) = penalties(layer, v, g, dim)
    error = float((second - right_second).norm() / right_second.norm())
    print(f"{name}: relative error of the second derivative {error:.2g}")
    torch.testing.assert_close(first, right_first)
    assert (error > 0.05) == is_wrong and (is_wrong or error < 1e-12)

v, g = (torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (3, 1)))
passes = [
    torch.autograd.gradgradcheck(f, (v, g), raise_exception=False)
    for f in (lambda v, g: torch._weight_norm(v, g, 0), lambda v, g: by_formula(v, g, 0))
]
print("gradgradcheck: torch's operator, the formula:", *passes)
assert passes == [False, True]
PYTHON
venv/bin/python show.py

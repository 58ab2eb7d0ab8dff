#!/usr/bin/env bash
# torch 2.15.0: fused SGD with momentum fails when a parameter gets its first gradient after others.
#
# Expected: a layer of the same group that is unfrozen later starts its momentum then, as the loop over
#   parameters, foreach SGD and fused Adam do; `fused` promises the same results.
# Seen: the step in which the second parameter has its first gradient raises a TypeError about a None
#   in a list of tensors, since the kernel's first step is one for the whole group. Both other
#   implementations agree to the last bit. With a group for each part it works.
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


def train(groups, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 5)) for _ in range(2)]
    parameters = [{"params": weights}] if groups == 1 else [{"params": [w]} for w in weights]
    steps = optimizer(parameters, lr=0.1, **options)
    try:
        for step in range(4):
            weights[0].grad = torch.full((4, 5), 1.0 + step)
            weights[1].grad = torch.full((4, 5), 2.0 + step) if step >= 2 else None
            steps.step()
    except TypeError as error:
        return f"TypeError: {error}"
    return [w.detach() for w in weights]


def same(one: object, other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(one, other, strict=True))


print("torch", torch.__version__.split("+")[0])
loop = train(1, momentum=0.9, foreach=False)
assert same(train(1, momentum=0.9, foreach=True), loop)
assert same(train(2, momentum=0.9, fused=True), loop)
adam = {"optimizer": torch.optim.Adam}
assert same(train(1, **adam, fused=True), train(1, **adam, foreach=False))
print("foreach SGD, fused SGD with two groups, fused Adam: as the loop")
found = train(1, momentum=0.9, fused=True)
print("fused SGD with one group:", found)
assert isinstance(found, str) and "NoneType" in found
PYTHON
venv/bin/python show.py

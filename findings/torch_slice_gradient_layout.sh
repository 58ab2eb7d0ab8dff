#!/usr/bin/env bash
# torch 2.15.0: the gradient of a slice of a channels_last tensor is not channels_last.
#
# Expected: operations keep channels_last in both directions, as the notes on memory formats say of
#   forward: a stride-2 slice of pixels, the shortcut of CIFAR's ResNets, hands a channels_last
#   gradient back, as average pooling with the same stride does.
# Seen: forward keeps the layout. Backward fills a new tensor that is contiguous in the order of the
#   dimensions, so that the addition before the slice mixes two layouts, and the layers before it get
#   a gradient that they have to rearrange, in every step. With the channels moved to the end for the
#   slice the gradient has the right layout.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch
from torch.nn import functional as F

WAYS = {
    "slice": (lambda x: x[:, :, ::2, ::2], False),
    "average pooling": (lambda x: F.avg_pool2d(x, 1, stride=2), True),
    "slice with the channels at the end": (
        lambda x: x.movedim(1, 3)[:, ::2, ::2].movedim(3, 1), True,
    ),
}

print("torch", torch.__version__.split("+")[0])
x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
expected = torch.zeros_like(x)
expected[:, :, ::2, ::2] = 1
for name, (take, keeps) in WAYS.items():
    (gradient,) = torch.autograd.grad(take(x).sum(), x)
    assert torch.equal(gradient, expected)
    found = gradient.is_contiguous(memory_format=torch.channels_last)
    print(f"{name}: the gradient has strides {gradient.stride()}, channels_last: {found}")
    assert found == keeps
PYTHON
venv/bin/python show.py

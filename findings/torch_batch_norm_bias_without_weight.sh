#!/usr/bin/env bash
# torch 2.15.0: the second derivative of batch_norm by its bias is lost where there is no weight.
#
# Expected: the gradient by the bias is the sum of the incoming gradient, so its derivative by the
#   incoming gradient is 1, whether there is a weight or not.
# Seen: with weight=None the derivative is not there (None, 0 in a sum), in training and in evaluation,
#   alone and beside the input's gradient; with a weight of ones it is 1. gradgradcheck finds it. A
#   penalty on gradients of a norm that has a bias alone is silently wrong.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch
import torch.nn.functional as F

print("torch", torch.__version__)
torch.manual_seed(0)
mean, variance = torch.randn(4).double(), torch.rand(4).double() + 0.5
x = torch.randn(6, 4, 9, dtype=torch.float64, requires_grad=True)
bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
incoming = torch.randn(6, 4, 9, dtype=torch.float64, requires_grad=True)
for training in (False, True):
    for weight in (None, torch.ones(4, dtype=torch.float64)):
        output = F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training)
        by_bias = torch.autograd.grad(output, (x, bias), incoming, create_graph=True)[1]
        second = torch.autograd.grad(by_bias.sum(), incoming, allow_unused=True)[0]
        known = None if second is None else second.unique().tolist()
        print(f"training {training}, weight {weight is not None}: derivative {known}, right [1.0]")
        assert known is None if weight is None else known == [1.0]
PYTHON
venv/bin/python show.py

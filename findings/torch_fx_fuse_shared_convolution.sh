#!/usr/bin/env bash
# torch 2.15.0: torch.fx.experimental.optimization.fuse folds a batch norm twice into a convolution
# that is called twice, and the network computes something else, without an error.
#
# Expected: a pair of convolution and norm that is applied to two inputs, as in a Siamese network, is
#   folded once, or left alone: the outputs are those from before.
# Seen: each call is folded again into the same convolution: outputs are off by 0.9. A convolution
#   that is shared by two norms is folded by both: off by 1.6. A norm shared by two convolutions, and
#   convolutions that share only their weight, come out right.
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
from torch.fx.experimental.optimization import fuse


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.running_var, 0.1, 4.0)
            nn.init.normal_(norm.weight)


class Siamese(Network):
    def forward(self, x):
        return self.norm(self.conv(x)) - self.norm(self.conv(2 * x))


class SharedConvolution(Network):
    def forward(self, x):
        return self.other(self.conv(self.norm(self.conv(x))))


class SharedNorm(Network):
    def forward(self, x):
        return self.norm(self.second(self.norm(self.conv(x))))


print("torch", torch.__version__.split("+")[0])
torch.manual_seed(0)
x = torch.randn(2, 3, 8, 8)
for cls in (Siamese, SharedConvolution, SharedNorm):
    network = cls().eval()
    with torch.no_grad():
        error = float((fuse(network)(x) - network(x)).abs().max())
    print(f"{cls.__name__}: off by {error:.2g}")
    assert error < 1e-5 if cls is SharedNorm else error > 0.1
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# torch 2.15.0: nn.TransformerEncoderLayer in evaluation computes a LayerNorm whatever its norms are.
#
# Expected: norm1 and norm2 are modules that the layer calls, so another norm put there is used, in
#   evaluation as in training: without dropout both give the same.
# Seen: without gradients in evaluation a fused kernel takes weight, bias and eps of norm1 and norm2
#   and never calls them. A subclass of nn.LayerNorm whose forward triples its output is evaluated as
#   if it did not; with nn.RMSNorm, which trains, evaluation ends in an AttributeError ('bias'). The
#   kernel asks for equal eps, for no hooks, and not for the class.
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


class Tripled(nn.LayerNorm):
    def forward(self, x):
        return 3 * super().forward(x)


def make_layer(norm):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.norm1, layer.norm2 = norm(16), norm(16)
    return layer


@torch.no_grad()
def difference(layer):
    x = torch.randn(2, 5, 16)
    return float((layer.train()(x) - layer.eval()(x)).abs().max())


print("torch", torch.__version__.split("+")[0])
seen = {norm.__name__: difference(make_layer(norm)) for norm in (nn.LayerNorm, Tripled)}
for name, value in seen.items():
    print(f"{name}: training and evaluation differ by {value:.2g}")
assert seen["LayerNorm"] < 1e-5 and seen["Tripled"] > 1
try:
    difference(make_layer(nn.RMSNorm))
except AttributeError as error:
    print("RMSNorm:", error)
    assert "bias" in str(error)
else:
    raise SystemExit("RMSNorm is evaluated")
PYTHON
venv/bin/python show.py

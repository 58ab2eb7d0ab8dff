#!/usr/bin/env bash
# torch 2.15.0 with onnxscript 0.7.2: an exported RMS norm loses an eps of 1e-8 or less.
#
# Expected: torch.onnx.export keeps the eps of a norm, whatever its size: a row of zeros gives zeros,
#   as in torch, and float32 tells 1e-8 + 1e-8 from 1e-8.
# Seen: the exporter's optimizer takes an addend up to 1e-8 for 0, without regard to what it is added
#   to, and leaves the addition out. A row of zeros gives NaN, one of sigma = 1e-4 is 40 % too large
#   for eps = 1e-8. Likewise a factor within 1e-5 of 1 is left out. With optimize=False both stay. A
#   LayerNorm is not touched, since its eps is an attribute. No message.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'onnx==1.23.2' 'onnxscript==0.7.2' \
  'onnxruntime==1.32.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

warnings.simplefilter("ignore")


class Scaled(nn.Module):
    def forward(self, x):
        return x * (1 + 9e-6)


def export(net, **options):
    program = torch.onnx.export(
        net, (torch.ones(2, 4),), dynamo=True, verbose=False, input_names=["x"], **options
    )
    program.save("net.onnx")
    kinds = [node.op_type for node in program.model.graph]
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    return kinds, lambda x: session.run(None, {"x": x})[0]


rows = np.array([[0, 0, 0, 0], [1e-4, -1e-4, 1e-4, -1e-4]], np.float32)
for eps in (1e-8, 1.1e-8):
    for optimize in (True, False):
        net = nn.RMSNorm(4, eps=eps)
        kinds, run = export(net, optimize=optimize)
        found, right = run(rows), net(torch.tensor(rows)).detach().numpy()
        print(f"eps {eps}, optimize={optimize}:", "Add" in kinds, found[:, 0], "torch", right[:, 0])
        kept = not (optimize and eps == 1e-8)
        assert ("Add" in kinds) is kept and np.allclose(found, right, rtol=1e-5) is kept
        assert kept or (np.isnan(found[0]).all() and abs(found[1, 0] / right[1, 0] - 2**0.5) < 1e-3)
print("x * (1 + 9e-6):", kinds := export(Scaled())[0])
assert kinds == ["Identity"]
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# coremltools 9.0 with torch 2.15.0: 1 / x becomes 1 / (x + 1e-4).
#
# Expected: torch.reciprocal(x), and a number divided by a tensor, which torch writes as one, are
#   converted to a division, or to one whose safeguard does not show.
# Seen: both become the operation inverse with its default epsilon = 1e-4, which is added to x, also
#   to a negative one, and in float32: 1 / 0.001 is 909, 1 / -0.001 is -1111, 1 / -1e-4 infinite. A
#   tensor divided by a tensor becomes real_div, and is right. No message.
# The values are those that coremltools itself gives for the operation.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'coremltools==9.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import coremltools
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from torch import nn


class Reciprocal(nn.Module):
    def forward(self, x, y):
        return torch.reciprocal(x) + y


class NumberOverTensor(nn.Module):
    def forward(self, x, y):
        return 1 / x + y


class TensorOverTensor(nn.Module):
    def forward(self, x, y):
        return y / x


for net in (Reciprocal(), NumberOverTensor(), TensorOverTensor()):
    program = torch.export.export(net, (torch.ones(3), torch.ones(3))).run_decompositions({})
    converted = coremltools.convert(
        program,
        convert_to="mlprogram",
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS17,
    )
    steps = converted._mil_program.functions["main"].operations
    step = next(each for each in steps if each.op_type != "const")
    epsilon = step.inputs["epsilon"].val if "epsilon" in step.inputs else None
    print(f"{type(net).__name__}: {step.op_type}, epsilon {epsilon}")
    is_inverse = not isinstance(net, TensorOverTensor)
    assert step.op_type == ("inverse" if is_inverse else "real_div")
    assert not is_inverse or np.isclose(epsilon, 1e-4)

inputs = np.array([1, 1e-3, -1e-3, -1e-4], np.float32)
found = []


@mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=coremltools.target.iOS17)
def _(x):
    y = mb.inverse(x=inputs)
    found.append(y.val)
    return mb.add(x=x, y=y)


print("1 /", inputs, "=", found[0])
assert np.allclose(found[0][:3], [0.9999, 909.09, -1111.1], rtol=1e-3) and np.isinf(found[0][3])
PYTHON
venv/bin/python -W ignore show.py 2>err || { tail -5 err; exit 1; }

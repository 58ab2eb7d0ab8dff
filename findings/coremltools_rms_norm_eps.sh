#!/usr/bin/env bash
# coremltools 9.0 with torch 2.15.0: a converted RMSNorm has another eps for each row, and rows of
# zeros give NaN.
#
# Expected: x / sqrt(mean(x^2) + eps) in any form, such as one that float16 holds: padding, a row of
#   zeros, gives 0, and rows below sqrt(eps) stay small, as in torch.
# Seen: the converter divides by max |x| first and adds eps to the mean of the quotients' squares, so
#   that it is eps * max |x|^2 in the formula. A row of +-1e-4 with eps = 1e-5 comes out as 1 instead
#   of 0.03, and of zeros, 0 / 0, as NaN, in float32 as in float16. RMSNorm with torch's default eps,
#   None, is not converted: "got 3 input(s), expected [4]".
# The program's steps are evaluated by numpy, since Core ML itself runs on macOS alone.
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
from torch import nn

STEPS = {
    "abs": lambda x: abs(x),
    "reduce_max": lambda x, axes, keep_dims: x.max(axes[0], keepdims=True),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes[0], keepdims=True),
    "square": lambda x: x * x,
    "sqrt": lambda x: np.sqrt(x),
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
}


def convert(net, x):
    program = torch.export.export(net.eval(), (x,)).run_decompositions({})
    return coremltools.convert(
        program,
        convert_to="mlprogram",
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS17,
    )._mil_program.functions["main"]


def evaluate(function, x):
    values = {name: x for name in function.inputs}
    for step in function.operations:
        if step.op_type != "const":
            given = {
                key: values.get(value.name, value.val) for key, value in step.inputs.items() if value
            }
            values[step.outputs[0].name] = STEPS[step.op_type](**given)
    return values[function.outputs[0].name]


x = torch.tensor([[1.0, -1, 1, -1], [1e-4, -1e-4, 1e-4, -1e-4], [0, 0, 0, 0]])
net = nn.RMSNorm(4, eps=1e-5)
function = convert(net, x)
print(" ".join(step.op_type for step in function.operations if step.op_type != "const"))
with np.errstate(all="ignore"):
    found = evaluate(function, x.numpy())[:, 0]
right = net(x)[:, 0].detach().numpy()
print("rows of 1, 1e-4 and 0: Core ML", found, "torch", right)
assert np.allclose(right, [1, 0.0316, 0], atol=1e-3)
assert np.allclose(found[:2], 1, atol=1e-3) and np.isnan(found[2])
try:
    convert(nn.RMSNorm(4), x)
    raise SystemExit("the default eps is converted")
except ValueError as error:
    print("default eps:", error)
    assert "got 3 input(s), expected [4]" in str(error)
PYTHON
venv/bin/python -W ignore show.py 2>err || { tail -5 err; exit 1; }

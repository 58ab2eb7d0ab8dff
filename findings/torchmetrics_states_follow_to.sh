#!/usr/bin/env bash
# torchmetrics 1.9.0: module.to(torch.bfloat16) makes the states of the metrics in it bfloat16, and a
# mean of equal values comes out wrong; module.bfloat16() leaves them alone.
#
# Expected: .to(dtype), .bfloat16() and .half() are one thing for a module; Metric documents that the
#   dtype of its states changes by set_dtype alone, so they stay float32, and a mean counts on.
# Seen: .bfloat16(), .half() and .type() are ignored by metrics, .to(dtype) is not, neither on the
#   metric nor on the module that holds it, which is how Lightning's bf16-true converts a module. A
#   bfloat16 counter cannot pass 4,096 by steps of 16: the mean of 40,000 times 1.25 is 2.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torchmetrics==1.9.0' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch
import torchmetrics
from torch import nn
from torchmetrics import MeanMetric

WAYS = {
    "module.bfloat16()": (lambda holder: holder.bfloat16(), 1.25),
    "module.type(torch.bfloat16)": (lambda holder: holder.type(torch.bfloat16), 1.25),
    "module.to(torch.bfloat16)": (lambda holder: holder.to(torch.bfloat16), 2.0),
    "metric.bfloat16()": (lambda holder: holder.mean.bfloat16(), 1.25),
    "metric.to(torch.bfloat16)": (lambda holder: holder.mean.to(torch.bfloat16), 2.0),
}

print("torchmetrics", torchmetrics.__version__)
for name, (convert, expected) in WAYS.items():
    holder = nn.Module()
    holder.mean = MeanMetric()
    convert(holder)
    for _ in range(2500):
        holder.mean.update(torch.tensor(1.25), weight=16)
    found = float(holder.mean.compute())
    print(f"{name}: states of {holder.mean.mean_value.dtype}, the mean of 1.25 is {found:.4g}")
    assert found == expected
PYTHON
venv/bin/python show.py

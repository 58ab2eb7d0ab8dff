#!/usr/bin/env bash
# torchmetrics 1.9.0: Perplexity is infinite as soon as softmax gives one token the probability 0.
#
# Expected: exp of the mean cross entropy, computed from log-probabilities as
#   torch.nn.functional.cross_entropy does: 1,000 tokens, one of them 120 nats off, have exp(0.12) = 1.127.
#   For float16 logits, as a half-precision model gives them, the same to a per cent or so.
# Seen: the metric takes the logarithm of softmax's output. In float32 a target 104 nats below the largest
#   logit has probability 0, in float16 one 18 nats below: the perplexity of the whole set is then
#   infinite, where cross_entropy is finite. In float16 the sum over tokens overflows as well: 9,000
#   tokens at 10 nats each are 90,000 > 65,504.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'torchmetrics==1.9.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import math

import torch
import torchmetrics
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity


def logits_of(nats):
    """Logits of two classes, where class 0 has these cross entropies (to 1e-4, from 9 nats on)."""
    return torch.stack([-nats, torch.zeros_like(nats)], -1)[None]


def perplexities(nats, dtype):
    """What the metric says, and exp of torch's cross entropy of the same logits in float32."""
    logits = logits_of(nats).to(dtype)
    target = torch.zeros(1, len(nats), dtype=torch.int64)
    metric = Perplexity()
    metric.update(logits, target)
    return float(metric.compute()), math.exp(cross_entropy(logits[0].float(), target[0]))


print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__.split("+")[0])
one_bad = torch.full((1000,), -20.0)
for dtype, nats in ((torch.float32, 100), (torch.float32, 120), (torch.float16, 15), (torch.float16, 20)):
    one_bad[0] = nats
    said, right = perplexities(one_bad, dtype)
    print(f"{dtype}, one token of 1,000 at {nats} nats: {said:.4g}; by cross_entropy {right:.4g}")
    assert math.isinf(said) == (nats in (120, 20)) and right < 1.2
for tokens in (5000, 9000):
    said, right = perplexities(torch.full((tokens,), 10.0), torch.float16)
    print(f"float16, {tokens:,} tokens at 10 nats: {said:.4g}; by cross_entropy {right:.4g}")
    assert math.isinf(said) == (tokens == 9000) and math.isclose(right, math.exp(10), rel_tol=1e-3)
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# timm 1.0.31: step hooks registered on timm.optim.Lookahead are taken and never called.
#
# Expected: Lookahead is a torch.optim.Optimizer, so register_step_pre_hook and
#   register_step_post_hook run their hooks at each step(), as for every optimizer of torch, or
#   registering raises.
# Seen: both return a handle and no hook ever runs: the class does not call Optimizer.__init__, which
#   wraps step() so that it calls hooks, and its own dictionaries of hooks are read by nobody. On the
#   optimizer inside the hooks run, before the slow weights are mixed in.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'timm==1.0.31' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import timm
import torch
from timm.optim import Lookahead
from torch import nn


def count_calls(optimizer, stepped):
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for _ in range(6):
        stepped.zero_grad()
        weight.square().sum().backward()
        stepped.step()
    return len(calls)


weight = nn.Parameter(torch.ones(3))
plain = torch.optim.SGD([weight], lr=0.1)
inner = torch.optim.SGD([weight], lr=0.1)
ahead = Lookahead(inner)
assert isinstance(ahead, torch.optim.Optimizer)
seen = {
    "SGD": count_calls(plain, plain),
    "Lookahead": count_calls(ahead, ahead),
    "the optimizer inside": count_calls(inner, ahead),
}
print("timm", timm.__version__)
for name, calls in seen.items():
    print(f"{name}: {calls} calls in 6 steps")
assert list(seen.values()) == [12, 0, 12]
PYTHON
venv/bin/python show.py

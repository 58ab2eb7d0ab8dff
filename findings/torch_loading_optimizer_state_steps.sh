#!/usr/bin/env bash
# torch 2.15.0: torch.distributed.checkpoint.state_dict.set_optimizer_state_dict takes a step.
#
# Expected: to load the state of an optimizer sets tensors, as Optimizer.load_state_dict does, and calls
#   neither step() nor what hooks into it.
# Seen: an optimizer that has no state yet is stepped once, with gradients of 0 and a learning rate set to
#   0, for it to make its state. Hooks of the optimizer and global ones run, and think that training took
#   a step: one that changes weights after each step (a projection, an average) changes them on a load.
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
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

rates = []


def make():
    """A module and its optimizer, whose hook keeps the module's weight at norm 1."""
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)

    def project(stepped, *_):
        rates.append(stepped.param_groups[0]["lr"])
        with torch.no_grad():
            module.weight /= module.weight.norm()

    optimizer.register_step_post_hook(project)
    return module, optimizer


print("torch", torch.__version__)
module, optimizer = make()
module(torch.ones(1, 2)).sum().backward()
optimizer.step()
state = get_optimizer_state_dict(module, optimizer)
plain = optimizer.state_dict()
rates.clear()

loaded, its_optimizer = make()
before = loaded.weight.norm().item()
its_optimizer.load_state_dict(plain)
print(f"load_state_dict: steps {rates}, norm {before:.3f} to {loaded.weight.norm():.3f}")
assert not rates

loaded, its_optimizer = make()
set_optimizer_state_dict(loaded, its_optimizer, state)
print(f"set_optimizer_state_dict: steps {rates}, norm {before:.3f} to {loaded.weight.norm():.3f}")
assert rates == [0.0] and abs(before - 1) > 0.1 and abs(loaded.weight.norm() - 1) < 1e-6
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# torch 2.15.0: how often an optimizer calls its step hooks depends on what was built before it.
#
# Expected: of an optimizer whose step calls that of the class which it extends, a hook registered
#   on one object runs once a step, or always twice; not more often after someone else made another
#   optimizer.
# Seen: once, until an object of the extended class is made anywhere in the process; twice from then
#   on, also for objects that exist already. The first call comes before what the subclass adds. A
#   pre-hook and a post-hook both do so; a profile counts the step twice as well.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch

print("torch", torch.__version__)


class CautiousAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        loss = super().step(closure)
        seen.append("what the subclass adds")
        return loss


def step(optimizer):
    seen.clear()
    weight.grad = torch.ones(2)
    optimizer.step()
    return list(seen)


seen = []
weight = torch.nn.Parameter(torch.ones(2))
optimizer = CautiousAdamW([weight])
optimizer.register_step_pre_hook(lambda *_: seen.append("pre-hook"))
optimizer.register_step_post_hook(lambda *_: seen.append("post-hook"))
before = step(optimizer)
print("at first:", *before, sep="\n  ")
torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])  # somewhere else, of other weights
after = step(optimizer)
print("once an AdamW was made:", *after, sep="\n  ")
added = "what the subclass adds"
assert before == ["pre-hook", added, "post-hook"]
assert after == ["pre-hook", "pre-hook", "post-hook", added, "post-hook"]
PYTHON
venv/bin/python show.py

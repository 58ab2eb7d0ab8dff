#!/usr/bin/env bash
# torch 2.15.0: torch.compile misreads the dimensions of flip where they come from a range.
#
# Expected: `w.flip(*range(2, 4))`, which turns a convolution's kernel round, is `w.flip(2, 3)`, and
#   compiles as it runs.
# Seen: eager code takes it. Traced, even by the backend that runs what was traced as it is, it raises
#   "Dimension out of range"; with the numbers written out, in a list, or for permute it is right.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import torch

print("torch", torch.__version__.split("+")[0])
WAYS = {
    "flip(2, 3)": lambda w: w.flip(2, 3),
    "flip(list(range(2, 4)))": lambda w: w.flip(list(range(2, 4))),
    "permute(0, 1, *range(2, 4))": lambda w: w.permute(0, 1, *range(2, 4)),
    "flip(*range(2, 4))": lambda w: w.flip(*range(2, 4)),
}
w = torch.arange(48.0).reshape(4, 3, 2, 2)
failed = []
for name, turn in WAYS.items():
    try:
        found = torch.compile(turn, backend="eager", fullgraph=True)(w)
        assert torch.equal(found, turn(w))
        print(f"{name}: as without torch.compile")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        failed.append(name)
assert failed == ["flip(*range(2, 4))"]
PYTHON
venv/bin/python show.py

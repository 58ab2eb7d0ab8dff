#!/usr/bin/env bash
# torch 2.15.0: a decorator of torch.compiler imports the whole compiler when a module is loaded.
#
# Expected: torch.compiler.disable and torch.compiler.assume_constant_result mark a function for a
#   compiler that may never run, as torch.jit.ignore does: a library can put them on its functions
#   at no cost to those who do not compile.
# Seen: applying either imports torch._dynamo and hundreds of modules with it, before the function
#   is called. `import` of a library that uses one takes about twice as long.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import sys
import time

started = time.process_time()
import torch

imported, before = time.process_time() - started, set(sys.modules)
decorate = {
    "torch.compiler.disable": lambda f: torch.compiler.disable(f),
    "torch.compiler.assume_constant_result": lambda f: torch.compiler.assume_constant_result(f),
    "torch.jit.ignore": lambda f: torch.jit.ignore(f),
}[sys.argv[1]]
started = time.process_time()
decorate(lambda x: x)
seconds = time.process_time() - started
added, dynamo = len(set(sys.modules) - before), "torch._dynamo" in set(sys.modules) - before
print(f"torch {torch.__version__.split('+')[0]}: {sys.argv[1]} imports {added} modules")
print(f"  in {seconds:.1f} s of CPU time, torch itself {imported:.1f} s")
assert dynamo == (sys.argv[1] != "torch.jit.ignore") and (added > 300) == dynamo
PYTHON
for name in torch.compiler.disable torch.compiler.assume_constant_result torch.jit.ignore; do
    venv/bin/python show.py "$name"
done

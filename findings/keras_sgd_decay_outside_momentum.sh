#!/usr/bin/env bash
# keras 3.15.1: weight_decay of SGD is decoupled; with momentum 0.9 it is a tenth of what the same
# numbers do in torch.
#
# Expected: for plain SGD, as in torch and in the papers that give 5e-4 with momentum 0.9, decay is
#   added to the gradient, and momentum carries it: without a gradient the weight's relative shrinkage
#   a step tends to lr * weight_decay / (1 - momentum).
# Seen: it is lr * weight_decay from the first step to the last, whatever the momentum: with 0.9 a
#   tenth. The argument has one description for all optimizers; only AdamW's class names it decoupled.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'keras==3.15.1' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import os

os.environ["KERAS_BACKEND"] = "jax"
import keras

print("keras", keras.__version__)
LR, DECAY = 0.001, 0.1
for momentum in (0.0, 0.9):
    weight = keras.Variable([1.0, 1.0])
    optimizer = keras.optimizers.SGD(LR, momentum=momentum, weight_decay=DECAY)
    optimizer.build([weight])
    value, velocity, shrinkage = 1.0, 0.0, []
    for _ in range(60):
        before = float(weight[0])
        optimizer.apply([keras.ops.zeros(2)], [weight])
        velocity = momentum * velocity + DECAY * value
        rate, value = LR * velocity / value, value - LR * velocity
        shrinkage.append(1 - float(weight[0]) / before)
    print(f"momentum {momentum}: shrinks by {shrinkage[-1]:.2e} a step; in the gradient {rate:.2e}")
    assert abs(shrinkage[-1] / (LR * DECAY) - 1) < 0.05
    assert abs(rate * (1 - momentum) / (LR * DECAY) - 1) < 0.05
PYTHON
venv/bin/python show.py

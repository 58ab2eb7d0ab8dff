#!/usr/bin/env bash
# qwix 0.1.8: quantising a float16 network to int8 makes nearly all of its weights 0.
#
# Expected: int8 weights with one scale a channel cost a network no accuracy to speak of, whether it is
#   float32, bfloat16 or float16: the scale is the channel's largest value by 127.5.
# Seen: so it is in float32 and bfloat16. A scale below √(smallest normal number) is taken for that of an
#   all-zero channel and becomes 1. In float32 that is 1e-19; in float16 it is 0.0078, which every channel
#   without a value of 1 or more falls below. Its integers are 0 (1 for values over a half), and digits
#   are told apart at chance. The same rule serves activations and, in quantised training, gradients.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'qwix==0.1.8' 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' \
  'numpy==2.4.6' 'scikit-learn==1.9.1'
cat >show.py <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from sklearn.datasets import load_digits

print("qwix", qwix.__version__)
pixels, labels = load_digits(return_X_y=True)
pixels, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(labels)
train, test = slice(0, 1_400), slice(1_400, None)
rules = [qwix.QuantizationRule(weight_qtype=jnp.int8)]


class Net(nnx.Module):
    def __init__(self, dtype):
        rngs, kinds = nnx.Rngs(0), {"dtype": dtype, "param_dtype": dtype}
        self.first = nnx.Linear(64, 64, rngs=rngs, **kinds)
        self.last = nnx.Linear(64, 10, rngs=rngs, **kinds)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


@nnx.jit
def step(net, optimizer):
    def loss(net):
        scores = optax.softmax_cross_entropy_with_integer_labels(net(pixels[train]), labels[train])
        return scores.mean()

    optimizer.update(net, nnx.grad(loss)(net))


def accuracy(net):
    return float((net(pixels[test]).argmax(1) == labels[test]).mean())


net = Net(jnp.float32)
optimizer = nnx.Optimizer(net, optax.adamw(3e-3), wrt=nnx.Param)
for _ in range(200):
    step(net, optimizer)
seen = {}
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    cast = Net(dtype)
    nnx.update(cast, jax.tree.map(lambda value: value.astype(dtype), nnx.state(net, nnx.Param)))
    quantised = qwix.quantize_model(cast, qwix.PtqProvider(rules), pixels[:1])
    weight = cast.first.kernel[...]
    integers = qwix.quantize(weight, jnp.int8, channelwise_axes=[1]).qvalue
    seen[dtype] = int(abs(integers).max()), accuracy(cast), accuracy(quantised)
    print(f"{dtype.__name__}: weights of up to {float(abs(weight).max()):.2f}, integers of up to {seen[dtype][0]},")
    print(f"  accuracy {seen[dtype][1]:.3f}, with int8 weights {seen[dtype][2]:.3f}")
for dtype in (jnp.float32, jnp.bfloat16):
    assert seen[dtype][0] == 127 and seen[dtype][2] > seen[dtype][1] - 0.01 > 0.9
low, before, after = seen[jnp.float16]
assert low <= 1 and before > 0.9 and after < 0.3
PYTHON
JAX_PLATFORMS=cpu venv/bin/python show.py

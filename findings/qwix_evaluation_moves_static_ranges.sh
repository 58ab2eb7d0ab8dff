#!/usr/bin/env bash
# qwix 0.1.8: evaluating an NNX network moves its static ranges; the same images give other scores each time.
#
# Expected: after net.eval() a forward changes nothing: the running ranges of act_static_scale are used and
#   not updated, as batch norm's running statistics are, and as the Linen form of the same network does
#   unless its caller makes quant_stats mutable.
# Seen: each forward is counted into the ranges, in evaluation as in training, while the batch norm beside
#   keeps still: scores differ between two evaluations, and a checkpoint holds ranges of the validation
#   data. What stops it is an attribute that neither eval() nor the docs know, disable_quant_stats_update.
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
test, rotated = pixels[1_400:], jnp.rot90(pixels[1_400:].reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64) * 0.5
STEPS = 300


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@nnx.jit
def step(net, optimizer, batch):
    def loss(net):
        scores = optax.softmax_cross_entropy_with_integer_labels(net(pixels[batch]), labels[batch])
        return scores.mean()

    optimizer.update(net, nnx.grad(loss)(net))


def count(net):
    return int(net.last.dot_general0_lhs.get_value()["count"])


rule = qwix.QtRule(weight_qtype=jnp.int8, act_qtype=jnp.int8, act_static_scale=True)
net = qwix.quantize_model(Net(), qwix.QtProvider([rule]), pixels[:2])
optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
for batch in jax.random.randint(jax.random.key(0), (STEPS, 50), 0, 1_400):
    step(net, optimizer, batch)
net.eval()
mean, before = net.norm.mean[...], count(net)
first = net(test)
again = jnp.abs(net(test) - first).max()
for _ in range(20):
    net(rotated)
later, after = jnp.abs(net(test) - first).max(), count(net)
print(f"batches in the ranges after training: {before}, after 23 evaluations: {after}")
print(f"scores of up to {jnp.abs(first).max():.1f} change by {again:.3f} when evaluated again, and by {later:.2f}")
print("after 20 evaluations of other images; the batch norm is unchanged:", bool((mean == net.norm.mean[...]).all()))
assert before == STEPS and after == STEPS + 23 and again > 0.005 and later > 0.1
assert (mean == net.norm.mean[...]).all()
net.set_attributes(disable_quant_stats_update=True)
assert (net(test) == net(test)).all() and count(net) == after
PYTHON
JAX_PLATFORMS=cpu venv/bin/python show.py

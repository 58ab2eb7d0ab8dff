#!/usr/bin/env bash
# qwix 0.1.8: bwd_stochastic_rounding does nothing for convolutions, nor for types such as "int5".
#
# Expected: with bwd_stochastic_rounding="uniform" the gradient is rounded at random wherever it is
#   quantised: other keys give other gradients, and their mean is nearer to the float gradient than one is.
# Seen: so it is in Dense with int8 gradients. A convolution, of one by one pixels, too, gives the same
#   gradient for every key, bit for bit that of rounding to nearest: its configuration has no field for
#   the noise. The types that are emulated ("int3", "int5" to "int7") round to nearest in Dense as well,
#   although they need it most. There is no error and no warning.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'qwix==0.1.8' 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import linen as nn

print("qwix", qwix.__version__)
KEYS = 64
images = jax.random.normal(jax.random.key(0), (8, 6, 6, 16))


def error(gradient, reference):
    return np.linalg.norm(gradient - reference) / np.linalg.norm(reference)


def show(name, layer, gradient_type, takes_effect):
    output, variables = layer.init_with_output(jax.random.key(1), images)
    target = jax.random.normal(jax.random.key(2), output.shape) ** 5

    def gradients(layer):
        def loss(variables, key):
            noise = {"stochastic_rounding": key}
            return (layer.apply(variables, images, rngs=noise) * target).sum()

        compiled = jax.jit(jax.grad(loss))
        keys = [jax.random.key(seed) for seed in range(KEYS)]
        return np.stack([compiled(variables, key)["params"]["kernel"] for key in keys])

    def quantised(**rounding):
        rule = qwix.QtRule(
            weight_qtype=jnp.int8, act_qtype=jnp.int8, bwd_qtype=gradient_type, **rounding
        )
        return gradients(qwix.quantize_model(layer, qwix.QtProvider([rule])))

    exact, nearest = gradients(layer)[0], quantised()[0]
    random = quantised(bwd_stochastic_rounding="uniform")
    other = sum(not np.array_equal(gradient, nearest) for gradient in random)
    one, mean = error(random[0], exact), error(random.mean(0), exact)
    print(f"{name}: {other} of {KEYS} keys differ from nearest; error {one:.4f}, of the mean {mean:.4f}")
    assert other == (KEYS if takes_effect else 0)
    assert (mean < one / 2) == takes_effect


show("Dense, int8", nn.Dense(16), jnp.int8, takes_effect=True)
show("Dense, int5", nn.Dense(16), "int5", takes_effect=False)
show("Conv 1x1, int8", nn.Conv(16, (1, 1)), jnp.int8, takes_effect=False)
show("Conv 3x3, int8", nn.Conv(16, (3, 3)), jnp.int8, takes_effect=False)
PYTHON
JAX_PLATFORMS=cpu venv/bin/python show.py

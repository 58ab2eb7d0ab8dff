#!/usr/bin/env bash
# transformers 5.24.0: Trainer gives weight decay to the weights of batch norms, not to those of layer
# norms.
#
# Expected: the parameters of norms are without weight decay, as in all of the library's examples.
# Seen: layer norms are found by class, others by patterns of names (layernorm, norm, _norm). A
#   ResNet's and a RegNet's batch norms are called normalization, which no pattern meets: all their
#   weights decay, their biases do not. The same holds for layer_scale_parameter of ConvNeXt.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'transformers==5.24.0' 'accelerate>=1.1' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging

logging.disable(logging.WARNING)
import torch
import transformers
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
)

print("transformers", transformers.__version__)
sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
resnet = ResNetModel(ResNetConfig(embedding_size=8, **sizes))
regnet = RegNetModel(RegNetConfig(embedding_size=8, groups_width=4, **sizes))
convnext = ConvNextModel(ConvNextConfig(**sizes))
trainer = Trainer(resnet, TrainingArguments(output_dir="out", use_cpu=True, weight_decay=0.1))
for net, kind, norms in (
    (resnet, "batch norm", torch.nn.BatchNorm2d),
    (regnet, "batch norm", torch.nn.BatchNorm2d),
    (convnext, "layer norm", torch.nn.LayerNorm),
):
    decayed = set(trainer.get_decay_parameter_names(net))
    layers = [name for name, module in net.named_modules() if isinstance(module, norms)]
    weights, biases = ([f"{name}.{part}" for name in layers] for part in ("weight", "bias"))
    found = [len(decayed.intersection(names)) for names in (weights, biases)]
    name = f"{type(net).__name__}: {kind}"
    print(f"{name} weights decayed {found[0]} of {len(weights)}, biases {found[1]}")
    assert layers and found == [len(layers) if kind == "batch norm" else 0, 0]
scales = [name for name, p in convnext.named_parameters() if "layer_scale" in name]
print(f"ConvNextModel: layer scales decayed {len(decayed & set(scales))} of {len(scales)}")
assert scales and set(scales) <= decayed
PYTHON
venv/bin/python show.py

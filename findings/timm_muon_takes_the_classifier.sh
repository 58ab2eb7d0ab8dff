#!/usr/bin/env bash
# timm 1.0.31: create_optimizer_v2(model, "muon") trains the classifier, the stem and the patch
# embedding by Muon, too.
#
# Expected: as Muon's authors and torch's own docs advise, hidden matrices by Muon; the classifier,
#   whose name timm knows, embeddings, norms and biases by its Adam part.
# Seen: all parameters of two or more dimensions but the class token and the positions are
#   orthogonalised: the update of `head.weight` and of `patch_embed.proj.weight` has all its singular
#   values near one value, where that of Adam's first step is lr times the signs.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'timm==1.0.31' 'torch==2.15.0' 'torchvision==0.29.2' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import timm
import torch
from timm.optim import create_optimizer_v2

print("timm", timm.__version__, "torch", torch.__version__.split("+")[0])
LR = 0.02
for name in ("resnet18", "vit_tiny_patch16_224"):
    torch.manual_seed(0)
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, "muon", lr=LR, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    by_adam = []
    for n, p in model.named_parameters():
        if p.ndim > 1 and torch.allclose((p - before[n]).abs(), torch.tensor(LR), rtol=1e-2):
            by_adam.append(n)
    head = f"{model.pretrained_cfg['classifier']}.weight"
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    print(f"{name}: the classifier is {head}, the first layer {first}; by Adam: {by_adam}")
    assert by_adam == [n for n in ("cls_token", "pos_embed") if n in before]
    for n in (head, first):
        values = torch.linalg.svdvals((model.get_parameter(n) - before[n]).flatten(1))
        print(f"  {n}: singular values of its update {values[-1]:.3f} to {values[0]:.3f}")
        assert values[0] / values[-1] < 4
PYTHON
venv/bin/python show.py

"""timm: fine-tune one of its networks with L1 norms, its own groups and optimizer, under a rule.

Output:

    resnet18: swapped 20 BatchNorm2d → L1BatchNorm2d
    group of 41 with weight decay 0.0
    group of 1 with weight decay 0.05
    group of 20 with weight decay 0.0
    loss 2.4 → 0.5
    norms moved by at most 3e-06
    written: digits.pt, for timm's own resnet18
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch.nn.functional import cross_entropy, interpolate

from nmlightning import Hyperball, exempt_from_decay, export_network, swap_norms

torch.manual_seed(1)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
images = interpolate(images, size=32).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)

# pretrained=True is what you want; without it this example needs no download.
net = timm.create_model("resnet18", pretrained=False, num_classes=10)
print(f"resnet18: {swap_norms(net, 'l1')}")

rule = Hyperball(exclude=["fc.*"])  # the new head is left to the optimizer
groups = param_groups_weight_decay(net, weight_decay=0.05)  # no norms and biases
groups = exempt_from_decay(groups, net, rule)  # nor what the rule holds
for group in groups:
    print(f"group of {len(group['params'])} with weight decay {group['weight_decay']}")
optimizer = create_optimizer_v2(groups, opt="adamw", lr=0.01)
handle = rule.attach(optimizer, net)

weights = {name: q.norm().item() for name, q in net.named_parameters() if q.ndim == 4}
losses = []
for batch in torch.randperm(1500)[:480].split(32):
    optimizer.zero_grad()
    loss = cross_entropy(net(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.1f} → {losses[-1]:.1f}")
moved = [abs(net.get_parameter(name).norm().item() / norm - 1) for name, norm in weights.items()]
print(f"norms moved by at most {max(moved):.0e}")
handle.remove()

report = export_network(net, "digits.pt", "state_dict", (3, 32, 32), overwrite=True)
print(f"written: {report.file}, for timm's own resnet18")

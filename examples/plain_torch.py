"""Plain torch: swap the norms of a network, hold its weights by a rule, give it back to torch.

Output:

    swapped 2 BatchNorm2d → L1BatchNorm2d
    epoch 1: 91.2 % of the other digits are right
    epoch 2: 88.2 % of the other digits are right
    epoch 3: 92.6 % of the other digits are right
    norm of the first weight: 2.274 at first, 2.274 at the end
    in plain torch, without nmlightning: the same outputs to 0.0e+00
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from nmlightning import Hyperball, exempt_from_decay, swap_norms


def make_network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 10)),
    )


torch.manual_seed(1)
digits = load_digits()  # 1,797 images of 8×8, which come with scikit-learn
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)

net = make_network()
print(swap_norms(net, "l1"))  # batch norms now divide by the mean absolute deviation

rule = Hyperball(include=["0.weight", "3.weight"])  # each step turns these weights by lr
groups = exempt_from_decay(net.parameters(), net, rule)  # and so they must not decay
optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01)
rule.attach(optimizer, net)
first = net[0].weight.norm().item()

for epoch in range(3):
    net.train()
    for batch in torch.randperm(1500).split(50):
        optimizer.zero_grad()
        cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    net.eval()
    right = (net(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"epoch {epoch + 1}: {100 * right:.1f} % of the other digits are right")

print(f"norm of the first weight: {first:.3f} at first, {net[0].weight.norm():.3f} at the end")
plain = make_network().eval()
plain.load_state_dict(net.state_dict())  # evaluation is nn.BatchNorm2d's
difference = (plain(images) - net(images)).abs().max().item()
print(f"in plain torch, without nmlightning: the same outputs to {difference:.1e}")

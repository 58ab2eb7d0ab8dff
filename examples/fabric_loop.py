"""Fabric: a loop of one's own, whose norms, steps and gradients are recorded and logged.

Output:

    step 60: 0.0136 rad, of ‖w‖ 0.0117, gradient 0.1145, clipped 0.1028
    step 120: 0.0094 rad, of ‖w‖ 0.0090, gradient 0.0042, clipped 0.0042
    NormHistory(5 records of 3 weights, steps 0 to 120)
    rotation of 0.weight: 0.013 in step 60, 0.009 in step 120
"""

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from nmlightning import track_norms

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
fabric.seed_everything(1, verbose=False)
digits = load_digits()  # 1,797 images of 8×8, which come with scikit-learn
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
net = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
)
net, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))


def log(values: dict[str, float], step: int) -> None:  # or wandb.log, mlflow.log_metrics, …
    names = ("rotation", "update_ratio", "unclipped_gradient_norm", "gradient_norm")
    rotation, ratio, gradient, clipped = (values[f"{name}/all"] for name in names)
    print(f"step {step}: {rotation:.4f} rad, of ‖w‖ {ratio:.4f}, ", end="")
    print(f"gradient {gradient:.4f}, clipped {clipped:.4f}")


chosen = ["rotation", "update_ratio", "unclipped_gradient_norm", "gradient_norm"]
with track_norms(net, optimizer, every=60, log=log, quantities=chosen, path="run") as tracker:
    for _ in range(4):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            fabric.backward(cross_entropy(net(images[batch]), labels[batch]))
            tracker.measure()  # of gradients before they are clipped
            fabric.clip_gradients(net, optimizer, max_norm=0.5)
            optimizer.step()
        tracker.end_epoch()
print(tracker.history)
first, second = tracker.history.quantities["rotation"][[2, 4], 0]
print(f"rotation of 0.weight: {first:.3f} in step 60, {second:.3f} in step 120")

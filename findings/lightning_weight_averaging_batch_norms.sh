#!/usr/bin/env bash
# pytorch-lightning 2.6.6: WeightAveraging averages the running statistics of batch norms from their
# initial values on, and its count of batches stands still at 1.
#
# Expected: the averaged network is validated with running statistics that fit it: the latest, or those
#   of a pass over the data at the end, as StochasticWeightAveraging makes one.
# Seen: one feature of mean 5, three epochs of eight batches. The network's running mean is 4.6, the
#   averaged network's 3.3: the mean of all its values since the 0 before training. What is averaged as
#   an integer is cut, so that num_batches_tracked stays 1 (24 in the network). Weights and statistics
#   of fit's end are these. StochasticWeightAveraging ends with 5.0, from 8 batches.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'pytorch-lightning==2.6.6' 'torch==2.15.0' 'numpy==2.4.6'
cat >show.py <<'PYTHON'
import logging

logging.disable(logging.WARNING)
import warnings

warnings.filterwarnings("ignore")
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(1), nn.Linear(1, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return self.linear(self.norm(batch[0])).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callback: pl.Callback | None) -> tuple[float, int]:
    pl.seed_everything(0, verbose=False)
    data = torch.randn(64, 1)
    data = DataLoader(TensorDataset(data - data.mean() + 5), batch_size=8)
    net = Net()
    pl.Trainer(
        accelerator="cpu", max_epochs=3, callbacks=callback, logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(net, data)
    return net.norm.running_mean.item(), int(net.norm.num_batches_tracked)


print("pytorch-lightning", pl.__version__, "torch", torch.__version__.split("+")[0])
for name, callback, low, high, count in (
    ("no averaging", None, 4.5, 4.7, 24),
    ("WeightAveraging", WeightAveraging(), 3.2, 3.4, 1),
    ("StochasticWeightAveraging", StochasticWeightAveraging(0.1, swa_epoch_start=1), 4.99, 5.01, 8),
):
    mean, batches = fit(callback)
    print(f"{name}: running mean {mean:.2f} after {batches} batches")
    assert low < mean < high and batches == count
PYTHON
venv/bin/python show.py

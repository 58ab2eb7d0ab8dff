"""A small net to fit, the ways of running it, and loops other than the plain fit."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
from lightning.fabric import Fabric
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from nmlightning import apply_weight_norm, swap_norms
from nmlightning.callbacks import NormSwap, WeightNormSwap, WeightNormTracker
from nmlightning.optim import Hyperball

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False,
         "enable_model_summary": False, "max_epochs": 2}  # fmt: skip


class Net(pl.LightningModule):
    """Learns four classes of images; `by_hand` names the parts that are changed here."""

    def __init__(self, by_hand: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.by_hand, self.lr, self.batch_size = by_hand, 0.05, 4
        self.rule_state: Any = None
        change(self, by_hand)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "steered" in self.by_hand:
            checkpoint["by hand"] = self.handle.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rule_state = checkpoint.get("by hand")

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        trained = [q for q in self.parameters() if q.requires_grad]
        return attach(torch.optim.SGD(trained, lr=self.lr, momentum=0.9), self)

    def train_dataloader(self) -> Any:
        return make_data(self.batch_size)

    def val_dataloader(self) -> Any:
        return make_data(self.batch_size)


def change(module: nn.Module, by_hand: str) -> None:
    if "norms" in by_hand:
        swap_norms(module, "l1")
    if "weights" in by_hand:
        apply_weight_norm(module)


def attach(optimizer: Any, module: nn.Module) -> Any:
    if "steered" in module.by_hand:
        module.handle = Hyperball().attach(optimizer, module)
        if module.rule_state:
            module.handle.load_state_dict(module.rule_state)
    return optimizer


def make_data(batch_size: int = 4, batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * batches, 2, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(4 * batches) % 4), batch_size=batch_size)


class Run:
    """What one run is given: the module, the callbacks and a folder.

    `part` names what is changed, `by` is "callbacks", "hand" or "nothing".
    """

    def __init__(self, part: str, by: str, folder: str) -> None:
        self.part, self.by, self.folder = part, by, folder
        self.fits = 0

    def module(self, cls: type[Net] = Net) -> Net:
        return cls(self.part if self.by == "hand" else "")

    def callbacks(self) -> list[Any]:
        if self.by != "callbacks":
            return []
        tracker = WeightNormTracker(steering=Hyperball() if "steered" in self.part else None)
        changes = [NormSwap("l1")] + [WeightNormSwap()] * ("weights" in self.part)
        return [*changes, tracker]

    def trainer(self, *others: Any, first: bool = False, package: Any = pl, **flags: Any) -> Any:
        """Return a Trainer with other callbacks behind or before ours."""
        self.fits += 1
        both = [*others, *self.callbacks()] if first else [*self.callbacks(), *others]
        folder = Path(self.folder) / str(self.fits)
        return package.Trainer(**{**QUIET, "callbacks": both, "default_root_dir": folder, **flags})


Case = Callable[[Run], nn.Module]


def fit(run: Run, *others: Any, cls: type[Net] = Net, **flags: Any) -> nn.Module:
    module = run.module(cls)
    run.trainer(*others, **flags).fit(module)
    return module


class Synced(Net):
    """Set sync on norms swapped by hand, as the Trainer has callbacks do."""

    def __init__(self, by_hand: str = "") -> None:
        super().__init__(by_hand.replace("norms", ""))
        if "norms" in by_hand:
            swap_norms(self, "l1", {"sync": True})


def fit_synced(run: Run, **flags: Any) -> nn.Module:
    return fit(run, cls=Synced, sync_batchnorm=run.by != "hand", **flags)


class StepsByHand(Net):
    """Steps the optimizer itself, Lightning's by default."""

    pl_optimizer = True

    def __init__(self, by_hand: str = "") -> None:
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], _: int) -> None:
        self.take(self.optimizers(use_pl_optimizer=self.pl_optimizer), batch)

    def take(self, optimizer: Any, batch: list[Tensor]) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class StepsTorch(StepsByHand):
    pl_optimizer = False


class StepsInside(StepsByHand):
    def training_step(self, batch: list[Tensor], _: int) -> None:
        self.take(self.optimizers().optimizer, batch)


class TwoOptimizers(StepsByHand):
    def configure_optimizers(self) -> Any:
        parts = (self.backbone.parameters(), self.head.parameters())
        return [attach(torch.optim.SGD(part, lr=0.05), self) for part in parts]

    def training_step(self, batch: list[Tensor], _: int) -> None:
        for optimizer in self.optimizers():
            self.take(optimizer, batch)


class Toggles(TwoOptimizers):
    def training_step(self, batch: list[Tensor], index: int) -> None:
        optimizer = self.optimizers()[index % 2]
        self.toggle_optimizer(optimizer)
        self.take(optimizer, batch)
        self.untoggle_optimizer(optimizer)


class ByClosure(StepsByHand):
    def training_step(self, batch: list[Tensor], _: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Scheduled(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class OwnStep(Net):
    def optimizer_step(self, epoch: int, batch: int, optimizer: Any, closure: Any = None) -> None:
        if batch % 2:
            closure()  # gathers gradients
        else:
            optimizer.step(closure=closure)


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class Late(Net):
    """Builds its net in `configure_model`."""

    def __init__(self, by_hand: str = "") -> None:
        super().__init__(by_hand)
        self.backbone = None

    def configure_model(self) -> None:
        if self.backbone is None:
            self.backbone = Net(self.by_hand).backbone


class Lbfgs(Net):
    def configure_optimizers(self) -> Any:
        return attach(torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2), self)


class Sharded(Net):
    """As FSDP2's pages say."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def plain_loop(
    run: Run, prepare: Callable[[Any, Any], tuple[Any, Any]], backward: Any
) -> nn.Module:
    """Train without a Trainer, where all is done by hand: it must be as in a Trainer."""
    if run.by == "callbacks":
        module = Net(run.part)
        model, optimizer = prepare(module, torch.optim.SGD(module.parameters(), 0.05, 0.9))
        if "steered" in run.part:
            Hyperball().attach(optimizer, module)
        for _ in range(QUIET["max_epochs"]):
            for x, target in make_data():
                optimizer.zero_grad()
                backward(F.cross_entropy(model(x), target))
                optimizer.step()
        return module
    return fit(run)


def by_torch(run: Run) -> nn.Module:
    return plain_loop(run, lambda module, optimizer: (module, optimizer), Tensor.backward)


def by_fabric(run: Run) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=1)
    return plain_loop(run, fabric.setup, fabric.backward)


def by_accelerate(run: Run) -> nn.Module:
    accelerator = accelerate.Accelerator(cpu=True)
    return plain_loop(run, accelerator.prepare, accelerator.backward)


class ForTransformers(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), labels)}


def by_transformers(run: Run) -> nn.Module:
    if run.by != "callbacks":
        return fit(run, gradient_clip_val=1.0)
    module = Net(run.part)
    optimizer = module.configure_optimizers()
    options = transformers.TrainingArguments(
        run.folder, num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in make_data().dataset]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    model = ForTransformers(module)
    InOrder(model, options, train_dataset=data, optimizers=(optimizer, None)).train()
    return module


def in_lightning_pytorch(run: Run) -> nn.Module:
    class Unified(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.module()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return self.net.configure_optimizers()

    module = Unified()
    run.trainer(package=lightning.pytorch).fit(module, make_data())
    return module.net


def tune(run: Run, name: str, **options: Any) -> nn.Module:
    module, trainer = run.module(), run.trainer()
    getattr(Tuner(trainer), name)(module, **options)
    trainer.fit(module)
    return module


def validate_first(run: Run) -> nn.Module:
    module, trainer = run.module(), run.trainer()
    trainer.validate(module, verbose=False)
    trainer.fit(module)
    trainer.validate(module, verbose=False)
    trainer.predict(module, make_data())
    return module


def fit_again(run: Run) -> nn.Module:
    module = run.module()
    run.trainer().fit(module)
    run.trainer().fit(module)
    return module


def continue_fit(run: Run) -> nn.Module:
    module = run.module()
    trainer = run.trainer(max_epochs=1)
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    return module


def resume(run: Run, **flags: Any) -> nn.Module:
    trainer = run.trainer(**flags)
    trainer.fit(run.module())
    trainer.save_checkpoint(f"{run.folder}/last.ckpt")
    module = run.module()
    run.trainer().fit(module, ckpt_path=f"{run.folder}/last.ckpt", weights_only=False)
    return module


LOOPS: Mapping[str, Case] = {
    "automatic optimization": fit,
    "manual: self.optimizers().step()": lambda run: fit(run, cls=StepsByHand),
    "manual: use_pl_optimizer=False": lambda run: fit(run, cls=StepsTorch),
    "manual: .optimizer.step()": lambda run: fit(run, cls=StepsInside),
    "manual: step(closure)": lambda run: fit(run, cls=ByClosure),
    "two optimizers": lambda run: fit(run, cls=TwoOptimizers),
    "two optimizers, toggled": lambda run: fit(run, cls=Toggles),
    "a scheduler": lambda run: fit(run, cls=Scheduled),
    "optimizer_step overridden": lambda run: fit(run, cls=OwnStep),
    "no optimizer": lambda run: fit(run, cls=NoOptimizer),
    "configure_model": lambda run: fit(run, cls=Late),
    "LBFGS": lambda run: fit(run, cls=Lbfgs),
    "lightning.pytorch": in_lightning_pytorch,
    "plain torch": by_torch,
    "Fabric": by_fabric,
    "accelerate": by_accelerate,
    "transformers.Trainer": by_transformers,
    "Tuner.lr_find": partial(tune, name="lr_find", num_training=8),
    "Tuner.scale_batch_size": partial(
        tune, name="scale_batch_size", steps_per_trial=1, max_trials=2
    ),
    "validate before and after, predict": validate_first,
    "fit again": fit_again,
    "fit, then more epochs": continue_fit,
    "resume after an epoch": lambda run: resume(run, max_epochs=1),
    "resume within an epoch": lambda run: resume(run, max_steps=6),
}

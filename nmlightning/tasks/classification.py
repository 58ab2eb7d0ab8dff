"""Image classification with any network that maps images to logits."""

from typing import Any, Literal, cast, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nmlightning.errors import InputError, check_choice, check_flag, check_share, check_whole_number
from nmlightning.optim.param_groups import WeightDecayScope, parameter_groups
from nmlightning.surgery.recipes import check_recipes
from nmlightning.tasks import optimization
from nmlightning.tasks.checkpoint_match import check_same_network, remember_arguments
from nmlightning.tasks.numerics import apply_exactly, exact_zero, task_callbacks
from nmlightning.weights.channel_norms import is_sharded


class MeanLoss(Metric):
    """Σ images · loss / Σ images, over all batches and all processes.

    Sums are kept in float32, also in a module that is half. NaN where a loss was NaN, and where
    nothing was added.

    Examples:
        >>> metric = MeanLoss()
        >>> metric.update(torch.tensor(1.0), 3)
        >>> metric.update(torch.tensor(2.0), 1)
        >>> metric.compute()
        tensor(1.2500)
    """

    full_state_update = False
    total: Tensor
    images: Tensor
    _apply = apply_exactly

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", exact_zero(), dist_reduce_fx="sum")
        self.add_state("images", exact_zero(), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch, a scalar, and the number of its images."""
        self.total = torch.add(self.total, loss.detach().float(), alpha=images)
        self.images = self.images + images  # not in place: validate() leaves inference tensors

    def compute(self) -> Tensor:
        return self.total / self.images


CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
Stage = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,)


class ImageClassifier(pl.LightningModule):
    """Trains `net` with cross-entropy and logs loss, top-1 and, in evaluation, top-5 accuracy.

    Logged are `train/loss` and `train/top1`, and `loss`, `top1`, `top5` under `val/` and `test/`:
    means over the epoch and over all processes. Top-5 is top-all where there are fewer classes.
    `train/loss_step` is the loss of one batch, the mean over processes, every `log_every_n_steps`.
    The number of classes is the data module's `num_classes`, or the network's number of outputs
    where the data does not say. The learning rate changes after epochs, so milestones are epochs.

    Args:
        net: maps images (N, C, H, W) to logits (N, classes).
        optimizer: called with the parameter groups; its own `weight_decay` is that of the group
            that decays.
        lr_scheduler: called with the optimizer; stepped once an epoch. `ReduceLROnPlateau`
            watches its `monitor`, or `val/loss`.
        label_smoothing: at least 0 and less than 1, in training only.
        weight_decay_scope: `all`, `no_norm` (norms, gains and biases exempt), `no_conv` (the
            weights of convolutions exempt) or `last_layer`.
        split: "muon" marks parameter groups by `use_muon`, as timm's and pytorch_optimizer's Muon
            read it: hidden linear layers are True, all else is for AdamW.
        lr_batch_size: the images a step that the optimizer's learning rate is meant for. It is
            multiplied by (batch size × processes × accumulated batches) / lr_batch_size, unless
            this is None.
        compile: the mode that `torch.compile` compiles the network with, for each size of a batch,
            after the callbacks have swapped its norms; None leaves it eager. "reduce-overhead"
            replays CUDA graphs, several times faster for a network of many small layers. The first
            steps then take a minute, which is announced.
        channels_last: compute with images and weights that lie in memory with the channels next to
            each other. Results differ by rounding.
        fast: with "auto", `nm fit` sets what makes training on a CPU with bfloat16 instructions
            fast: channels_last, `precision: bf16-mixed`, and NormSwap's `fuse: add_relu`. It keeps
            another precision that is given, and elsewhere leaves all as it is. A Trainer of your
            own is given these three by you.

    Attributes:
        lr: the rate that `LearningRateFinder` or `Tuner.lr_find` has set, which `lr_batch_size`
            does not scale. None is that of the optimizer.

    Raises:
        InputError: for a label_smoothing out of its range or an lr_batch_size below 1; in training
            for labels outside the classes or a network with another number of outputs, or if the
            rate is to be scaled by a batch size that is not known; on loading a
            checkpoint of another network or, in a Trainer, of another recipe of norms or, to
            resume with scaled rates, of another number of images a step.

    Examples:
        >>> from torch.optim import SGD
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        >>> task = ImageClassifier(net, optimizer=lambda groups: SGD(groups, lr=0.1))
    """

    lr = optimization.FoundLearningRate()

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        weight_decay_scope: WeightDecayScope = "all",
        lr_batch_size: int | None = None,
        compile: CompileMode | None = None,
        channels_last: bool = False,
        fast: Literal["auto"] | None = None,
        split: Literal["muon"] | None = None,
    ) -> None:
        super().__init__()
        check_share("label_smoothing", label_smoothing)
        check_choice("compile", compile, (None, *get_args(CompileMode)))
        check_choice("fast", fast, (None, "auto"))
        if lr_batch_size is not None:
            check_whole_number("lr_batch_size", lr_batch_size)
        plain = ("label_smoothing", "weight_decay_scope", "lr_batch_size", "compile")
        remember_arguments(self, *plain, "channels_last", "split")
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.label_smoothing = label_smoothing
        self.weight_decay_scope = weight_decay_scope
        self.split = split
        self.lr_batch_size = lr_batch_size
        self.compile_mode = compile
        self.channels_last = check_flag("channels_last", channels_last)
        self._is_compiled = False
        self.metrics = nn.ModuleDict()
        self._logged: set[Stage] = set()  # whose metrics Lightning has, in this epoch

    def setup(self, stage: str) -> None:
        """Compile once; Lightning sets callbacks up first, so the norms are swapped by now."""
        self._logged.clear()
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if self.compile_mode is not None and not self._is_compiled:
            self.net.compile(mode=self.compile_mode, dynamic=False)  # batches have two sizes
            self._is_compiled = True

    def configure_callbacks(self) -> list[pl.Callback]:
        return task_callbacks("ImageClassifier", bool(self.compile_mode))

    def configure_model(self) -> None:
        """Shard the network once, under Lightning's `ModelParallelStrategy`, which has a mesh."""
        if self.device_mesh is not None and not any(map(is_sharded, self.net.parameters())):
            shard_blocks(self.net, self.device_mesh)

    def forward(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._step("train", batch, batch_idx, self.label_smoothing)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:  # to log each would be dear
            self.log("train/loss_step", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("test", batch, batch_idx)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Return the class probabilities (N, classes) of the images, with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        logits: Tensor = self(images)
        return logits.float().softmax(dim=1)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.net, None, self.weight_decay_scope, self.split)
        optimizer = optimization.make_optimizer(self.optimizer, groups)
        if self.lr_batch_size:
            images = optimization.global_batch_size(self._trainer)
            optimization.scale_learning_rates(optimizer, self.lr_batch_size, images)
        optimization.set_learning_rate(optimizer, self.lr)
        return optimization.add_schedule(optimizer, self.lr_scheduler, "epoch")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network or, in a Trainer, of another recipe.

        Outside a Trainer, `nmlightning.load_from_checkpoint` swaps after this.
        """
        check_same_network(self, checkpoint)
        if self._trainer is None:
            return
        check_recipes(self, checkpoint)
        if self.lr_batch_size is not None and self.trainer.training:
            ours = optimization.global_batch_size(self.trainer)
            theirs = checkpoint.get(optimization.KEY, ours)
            if theirs != ours:  # and so the learning rates that a resume keeps are others
                raise InputError(
                    f"The checkpoint has learning rates for {theirs} images a step, and this run "
                    f"has {ours}: choose data.batch_size, devices and accumulate_grad_batches that "
                    f"multiply to {theirs}."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many images a step the learning rates are for, where they were scaled."""
        if self.lr_batch_size is not None:
            checkpoint[optimization.KEY] = optimization.global_batch_size(self._trainer)

    def _check_classes(self, logits: Tensor, labels: Tensor, batch_idx: int) -> None:
        """Compare labels, outputs and data; on a GPU the labels of an epoch's first batch only."""
        outputs = logits.shape[1]
        data = self.trainer.datamodule if hasattr(self.trainer, "datamodule") else None
        classes = getattr(data, "num_classes", outputs)
        if outputs != classes:
            raise InputError(
                f"{type(self.net).__name__} has {outputs} outputs, but {type(data).__name__} has "
                f"{classes} classes: set the network's num_classes to {classes}."
            )
        if labels.device.type != "cpu" and batch_idx > 0:
            return
        lowest, highest = (int(label) for label in labels.aminmax())
        if lowest < 0 or highest >= classes:
            raise InputError(
                f"The labels go from {lowest} to {highest}, but {type(self.net).__name__} has the "
                f"classes 0 to {classes - 1}: check the labels or the network's num_classes."
            )

    def _step(
        self, stage: Stage, batch: Batch, batch_idx: int, label_smoothing: float = 0.0
    ) -> Tensor:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            kind = type(batch).__name__
            raise InputError(f"{type(self).__name__} takes images and labels, got a {kind}.")
        images, labels = batch
        logits = self(images)
        self._check_classes(logits, labels, batch_idx)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(exact, labels, label_smoothing=label_smoothing)
        self._log_step(stage, loss, logits, labels)
        return loss

    def _log_step(self, stage: Stage, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to the stage's metrics, which are handed to Lightning once an epoch.

        It asks them at the epoch's end; to log each batch would take half of a small net's step.
        """
        if not self.metrics:
            self._make_metrics(logits)
        mean_loss = cast(MeanLoss, self.metrics[f"loss_of_{stage}"])
        accuracies = cast(MetricCollection, self.metrics[f"accuracies_of_{stage}"])
        mean_loss.update(loss, len(labels))
        accuracies.update(logits.detach(), labels)
        if stage in self._logged:
            return
        self._logged.add(stage)
        means: dict[str, Metric] = {f"{stage}/loss": mean_loss}
        means.update(accuracies.items(copy_state=False))
        for name, value in means.items():
            self.log(
                name,
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=not name.endswith("top5"),  # the bar has room for the other four
                sync_dist=True,
                batch_size=len(labels),
            )

    def on_train_epoch_start(self) -> None:
        self._logged.discard("train")

    def on_validation_epoch_start(self) -> None:
        self._logged.discard("val")

    def on_test_epoch_start(self) -> None:
        self._logged.discard("test")

    @torch.inference_mode(False)  # the first logits come from a validation, the last from training
    def _make_metrics(self, logits: Tensor) -> None:
        for stage in get_args(Stage):
            accuracies = make_accuracies(stage, classes=logits.shape[1])
            self.metrics[f"accuracies_of_{stage}"] = accuracies.to(logits.device)
            self.metrics[f"loss_of_{stage}"] = MeanLoss().to(logits.device)


def make_accuracies(stage: Stage, classes: int) -> MetricCollection:
    """Return `top1`, and in evaluation `top5`, under the stage's name."""
    return MetricCollection(
        {
            f"top{k}": MulticlassAccuracy(
                classes,
                top_k=min(k, classes),
                average="micro",
                validate_args=False,  # it would wait for the device every step
            )
            for k in ((1,) if stage == "train" else (1, 5))
        },
        prefix=f"{stage}/",
        compute_groups=False,  # they would be merged where the first batch gives equal counts
    )


def shard_blocks(net: nn.Module, mesh: DeviceMesh) -> None:
    """Call `fully_shard` (FSDP2) on every block of `net`, and on `net` for the rest.

    A block is a module with parts in a `Sequential` or a `ModuleList`, such as the residual blocks
    of a ResNet. Each of N processes then holds 1/N of the weights, gradients and optimizer's state,
    and gathers the weights of one block while it computes with them. The norms of `net` are swapped
    and its weights normalised before; the mesh is of Lightning's `ModelParallelStrategy`.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise InputError(
            "ImageClassifier shards over all processes and splits no tensors: give "
            "ModelParallelStrategy a data_parallel_size of the number of processes, here "
            f"{mesh.size()}, and a tensor_parallel_size of 1."
        )
    lists = [part for part in net.modules() if isinstance(part, nn.Sequential | nn.ModuleList)]
    blocks = [block for part in lists for block in part if any(block.children())]
    for block in dict.fromkeys(reversed(blocks)):  # inner ones first, as fully_shard needs it
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])

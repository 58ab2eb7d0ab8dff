"""All uses of what Lightning does not document, for `pytorch_lightning` and `lightning.pytorch`.

Both packages hold the same code in two class trees, and a project uses one of them. Our callbacks
belong to both, so nothing here asks for a class of either by import, except their common bases.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from nmlightning.atomic_file import next_version
from nmlightning.errors import repr_by_arguments
from nmlightning.int8.ranges import holder_of
from nmlightning.norms.batch_norm_base import BatchNormBase
from nmlightning.surgery.lightning_hooks import watch_loading

Unfused = Callable[[nn.Module], AbstractContextManager[None]]

_LIGHTNING = ("pytorch_lightning.", "lightning.pytorch.")
# Callbacks whose setup copies the module, so that it has to see the swapped one.
_COPIES_IN_SETUP = ("WeightAveraging", "StochasticWeightAveraging")


if TYPE_CHECKING:
    CallbackBase = pl.Callback
    CheckpointIOBase = TorchCheckpointIO
else:
    _bases = [(pl.Callback, TorchCheckpointIO)]
    if find_spec("lightning") is not None:
        import lightning.fabric.plugins
        import lightning.pytorch

        _bases.append((lightning.pytorch.Callback, lightning.fabric.plugins.TorchCheckpointIO))
    _callbacks, _ios = zip(*_bases, strict=True)
    _own = {"__module__": __name__, "__repr__": repr_by_arguments}
    CallbackBase = type("CallbackBase", _callbacks, _own)
    """A callback for the Trainer of either package."""
    CheckpointIOBase = type("CheckpointIOBase", _ios, {"__module__": __name__})
    """A writer and reader of checkpoints for either, which writes as torch does."""

watch_loading()


def builds_in_configure_model(module: nn.Module) -> bool:
    """Return whether a LightningModule, of either package, overrides `configure_model`."""
    owner = next(cls for cls in type(module).__mro__ if "configure_model" in vars(cls))
    return not owner.__module__.startswith(_LIGHTNING)


def rebuild_copies(trainer: Any, module: nn.Module, before: Any, stage: str) -> None:
    """Let the callbacks that stand before `before` and copied `module` already copy it again."""
    for callback in trainer.callbacks[: trainer.callbacks.index(before)]:
        if _is_a(callback, *_COPIES_IN_SETUP):
            callback.setup(trainer, module, stage=stage)


def reshard(module: nn.Module) -> None:
    """Give FSDP2 its sharded parameters back: its root keeps them gathered after evaluation."""
    for part in module.modules():
        reshard_part: Any = getattr(part, "reshard", None)
        if reshard_part is not None:
            reshard_part()


def stands_behind(trainer: Any, callback: Any, name: str) -> bool:
    """Return whether a callback of a class of that name stands before `callback`."""
    return any(_is_a(each, name) for each in trainer.callbacks[: trainer.callbacks.index(callback)])


def _is_a(callback: Any, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(callback).__mro__)


def global_seed() -> int | None:
    """Return the seed of `seed_everything`, which Lightning hands to its processes."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def epochs_to_train(trainer: Any) -> int | None:
    """Return the `max_epochs` that the user set, None if there is no such limit.

    StochasticWeightAveraging adds an epoch that takes no step, for the statistics of batch norms.
    """
    if trainer.max_epochs in (None, -1):
        return None
    averaging = (c for c in trainer.callbacks if _is_a(c, "StochasticWeightAveraging"))
    return int(min([trainer.max_epochs, *(c._max_epochs for c in averaging)]))


def run_folder(trainer: Any) -> Path:
    """Return where a callback writes: the folder of the run in the first logger, or in the root.

    A logger that has none, such as wandb's, has that of Lightning's checkpoints. Without a logger
    it is the Trainer's root, or `lightning_logs/version_N` in it where that is the current folder.
    """
    logger, folder = trainer.logger, Path(trainer.default_root_dir)
    if logger is not None and logger.log_dir:
        folder = Path(logger.log_dir)
    elif logger is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder, str(logger.name), version)
    elif str(folder) == os.getcwd():
        folder = next_version(folder / "lightning_logs")
    chosen: Path = trainer.strategy.broadcast(folder)
    return chosen


def is_trial_run(trainer: Any) -> bool:
    """Return whether this is `fast_dev_run`, of which Lightning promises that it writes nothing."""
    return bool(trainer.fast_dev_run)


def in_added_epoch(trainer: Any) -> bool:
    """Return whether this is the epoch that StochasticWeightAveraging adds."""
    epochs = epochs_to_train(trainer)
    return epochs is not None and trainer.current_epoch >= epochs


def copying_strategy(trainer: Any) -> str | None:
    """Return the name of a strategy whose processes train copies of the module; None of others."""
    launcher = trainer.strategy.launcher
    if not _is_a(launcher, "_MultiProcessingLauncher"):
        return None
    names = {"fork": "ddp_fork (or ddp_notebook)"}
    return names.get(launcher._start_method, f"ddp_{launcher._start_method}")


def logging_is_due(trainer: Any) -> bool:
    """Return whether the Trainer logs what this batch gives: every `log_every_n_steps` batches."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)


def logged_step(trainer: Any) -> int:
    """Return the step under which the Trainer's loggers keep what is logged now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def takes_loaders_from_hooks(trainer: Any) -> bool:
    """Return whether `fit` calls `train_dataloader`, rather than having been given loaders."""
    return bool(trainer.fit_loop._data_source.is_module())


def restarts_silently(trainer: Any) -> bool:
    """Return whether Lightning resumes this epoch from its first batch, and does not say so.

    It looks at the steps, which several optimizers take in a batch, and at the batches, if known.
    """
    loaders, batches = trainer.fit_loop._combined_loader.flattened, trainer.num_training_batches
    if all(hasattr(loader, "load_state_dict") for loader in loaders):
        return False
    steps = 1 if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    return bool(trainer.global_step % steps == 0)


def training_sums(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return what the means over a training epoch are made of so far, on this process, by name.

    Those that the module updates by hand, without logging them, have its name for them as theirs.
    """
    loop, sums = trainer.fit_loop.epoch_loop, {}
    logged = [*loop._results.values(), *loop.val_loop._results.values()]
    modules = dict(trainer.lightning_module.named_modules())
    for part in modules.values():
        if isinstance(part, MetricCollection):
            part.values(copy_state=False)  # else only the first of a group has the newest
    metrics = {name: part for name, part in modules.items() if isinstance(part, Metric)}
    for name, metric in metrics.items():
        if metric.update_count and all(each.meta.metric_attribute != name for each in logged):
            state = _on_device(metric.metric_state, "cpu")
            sums[name] = {"attribute": name, "updates": metric.update_count, "state": state}
    for key, result in loop._results.items():
        if result.meta.on_epoch and not result.has_reset:
            metric = result if result.is_tensor else result.value
            state = _on_device(metric.metric_state, "cpu")
            attribute, updates = result.meta.metric_attribute, metric.update_count
            sums[key] = {"attribute": attribute, "updates": updates, "state": state}
    return sums


def add_training_sums(
    trainer: Any, sums: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Add what `training_sums` returned before a resume; return what has no place yet.

    A metric of the module is set before it is updated. What is made when it is first logged, as
    Lightning's own means are, then holds one batch, and is added to.
    """
    results, rest = trainer.fit_loop.epoch_loop._results, {}
    modules = dict(trainer.lightning_module.named_modules())
    for key, saved in sums.items():
        result = results.get(key)
        logged = result if result is None or result.is_tensor else result.value
        metric = modules.get(saved["attribute"], logged)
        if metric is None:
            rest[key] = saved
            continue
        state = _on_device(saved["state"], metric.device)
        if metric.update_count == 0 or key == saved["attribute"]:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._computed, metric._update_count = None, 0
        elif metric is result and (result.meta.is_max_reduction or result.meta.is_min_reduction):
            metric.value = result.meta.reduce_fx(state["value"], metric.value)
        else:
            metric._reduce_states(state)
        metric._update_count += saved["updates"]
    return rest


def _on_device(state: dict[str, Any], device: Any) -> dict[str, Any]:
    """Return a copy of a metric's state, of tensors and lists of them."""
    copied: dict[str, Any] = apply_to_collection(
        state, Tensor, lambda x: x.detach().clone().to(device)
    )
    return copied


def replace_torch_io(strategy: Any, io: TorchCheckpointIO) -> None:
    """Let `io` do what Lightning's own does, also inside those that wrap it, as AsyncCheckpointIO.

    Lightning sets the inner one of these when its getter is called, and never again.
    """
    outer, inner = strategy, strategy.checkpoint_io
    while getattr(inner, "checkpoint_io", None) is not None:
        outer, inner = inner, inner.checkpoint_io
    if type(inner) is TorchCheckpointIO:
        outer._checkpoint_io = io


def keep_through_sync(trainer: Any, unfused: Unfused) -> None:
    """Let `Trainer(sync_batchnorm=True)` synchronise our norms instead of replacing them by L2.

    Meanwhile `unfused` of `nmlightning.surgery.fuse.fuse` is entered with the model.
    """
    layer_sync = getattr(trainer.strategy, "_layer_sync", None)
    if layer_sync is not None and not isinstance(layer_sync, _SyncKeepingOurs):
        trainer.strategy._layer_sync = _SyncKeepingOurs(layer_sync, unfused)


def synchronise_norms(trainer: Any, module: nn.Module) -> None:
    """Do for our norms and ranges what `Trainer(sync_batchnorm=True)` asks for, always.

    Lightning 2.6 does nothing about it under ModelParallelStrategy.
    """
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        for layer in module.modules():
            if isinstance(layer, BatchNormBase):
                layer.sync = True
            if (holder := holder_of(layer)) is not None:
                holder.sync = True


class _SyncKeepingOurs:
    """Lightning's LayerSync, with our norms put back and set to synchronise themselves."""

    def __init__(self, original: Any, unfused: Unfused) -> None:
        self.original = original
        self._unfused = unfused

    def apply(self, model: nn.Module) -> nn.Module:
        return self._keep_ours(model, self.original.apply)

    def revert(self, model: nn.Module) -> nn.Module:
        return self._keep_ours(model, self.original.revert)

    def _keep_ours(self, model: nn.Module, convert: Any) -> nn.Module:
        named = model.named_modules(remove_duplicate=False)
        ours = {name: layer for name, layer in named if isinstance(layer, BatchNormBase)}
        with self._unfused(model):
            for name in ours:
                model.set_submodule(name, nn.Identity())  # convert takes all that it finds
            model = convert(model)
            for name, layer in ours.items():
                layer.sync = True
                model.set_submodule(name, layer)
        return model

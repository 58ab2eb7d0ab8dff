"""Checkpoints that are whole, one of the end of a fit, and what else an exact resume needs."""

import inspect
import math
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from nmlightning import atomic_file, compat
from nmlightning.datamodules.training_batches import count_batches_done
from nmlightning.errors import InputError
from nmlightning.surgery.recipes import register_after

_WEB = ("http://", "https://")


class AtomicCheckpointIO(compat.CheckpointIOBase):
    """Writes a checkpoint beside its target, on the disk, and then renames it.

    So a kill or a full disk never destroys the earlier checkpoint, as Lightning's own writing may.
    Other places, such as `s3://…`, are written by Lightning, and no objects are loaded from them.

    Raises:
        InputError: a file cannot be written, as on a full disk; an address not read, or damaged.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the checkpoint at once, or not at all."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file.replace_file(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; one at a web address anew each time, as it may be another by now."""
        if "://" not in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        try:
            if not str(path).startswith(_WEB):
                return super().load_checkpoint(path, map_location, weights_only is not False)
            with TemporaryFile() as file:
                with urlopen(str(path)) as content:
                    shutil.copyfileobj(content, file)
                if not atomic_file.is_whole_zip(file):
                    raise InputError(f"the checkpoint {path} is damaged: a checksum is wrong.")
                file.seek(0)
                loaded: dict[str, Any] = torch.load(file, map_location, weights_only=weights_only)
                return loaded
        except pickle.UnpicklingError as error:
            raise InputError(f"{path} holds objects, which are not loaded from there.") from error
        except (OSError, ValueError, ImportError) as error:  # of what names no file system
            if isinstance(error, InputError):
                raise
            raise InputError(f"the checkpoint {path} cannot be read: {error}.") from error


def replace_whole(strategy: Any) -> None:
    """Let a strategy that writes checkpoints by itself, as folders, write them beside the target.

    Those of FSDP and `ModelParallelStrategy` have a file of each rank, and no CheckpointIO writes.
    """
    save = strategy.save_checkpoint

    def save_beside(checkpoint: Any, filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(strategy.broadcast(filepath))
        draft = strategy.broadcast(atomic_file.draft_of(path))
        is_first, replace = strategy.is_global_zero, atomic_file.replace_folder
        with replace(path, draft) if is_first else atomic_file.explain_failure(path):
            strategy.barrier()
            save(checkpoint, draft / path.name, storage_options)
            strategy.barrier()

    strategy.save_checkpoint = save_beside


class EndCheckpoint(compat.CallbackBase):
    """Keeps the end of a fit as `last.ckpt` where no callback has a checkpoint of its step."""

    step = 0  # of the last checkpoint, or else that the fit started at
    file: Path | None = None  # where the end is kept, None where there are no checkpoints

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Delete what killed processes left of files in the runs beside this one."""
        folder = compat.run_folder(trainer)  # for which all processes wait
        if trainer.checkpoint_callbacks and not compat.is_trial_run(trainer):
            self.file = folder / "checkpoints" / "last.ckpt"
            if trainer.is_global_zero:
                atomic_file.remove_drafts(folder.parent, below=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where a fit stops within an epoch, before the epoch's means are reset."""
        if count_batches_done(trainer):
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, before other callbacks put averaged weights into the module."""
        if self.file and self.step != trainer.global_step:
            trainer.save_checkpoint(self.file)


_KEY = "nmlightning.ExactResume"


class ExactResume(compat.CallbackBase):
    """Makes a resumed run equal the uninterrupted one, bit for bit; `nm fit` includes it.

    It adds to a checkpoint, for every process and as plain tensors:

    - the random states of torch, its CUDA device, numpy and Python after the step. They are set
      before the next batch is taken, and at the end of an epoch before its loader shuffles.
    - within an epoch, the sums of the logged training means and the states of metrics that the
      module updates by hand; and what a module returns from `training_sums()`, for its
      `load_training_sums(sums)`.

    It needs the same number of processes and the same order of the data. This package's data
    modules and loaders with a `state_dict` keep it anywhere, others at the end of an epoch, and a
    warning says so within one. Validation does not change random numbers.

    Raises:
        InputError: at the start of a fit that asks for another seed, other optimizers or schedules,
            or options of these, than the checkpoint's.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], logger=False)
    """

    # They are replaced, never changed in place.
    _settings: Mapping[str, Any] = {}
    _loaded: Mapping[str, Any] = {}  # of the run that is resumed
    _random: Any = ()  # a list of RandomStates, until they are set
    _sums: Mapping[str, Any] = {}  # that are not yet among those of this run
    _own_sums: Mapping[str, Any] = {}  # that the module adds up itself

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have the random numbers set before the loader of an epoch begins, but after it is made.

        What makes loaders may split data at random, as it did in the run that is resumed.
        """
        self._loaded = checkpoint.get(_KEY) or {}
        ranks = self._loaded.get("ranks", [])
        if trainer.state.fn != "fit" or len(ranks) != trainer.world_size:
            return
        mine = ranks[trainer.global_rank]
        self._random, self._sums = [mine["random"]], mine["sums"]
        self._own_sums = mine["own_sums"]
        if self._loaded["within_epoch"]:
            return
        set_states = partial(_set_once, self._random, trainer.strategy.root_device)
        if not compat.takes_loaders_from_hooks(trainer):
            set_states()
        for source in filter(None, (getattr(trainer, "datamodule", None), pl_module)):
            register_after(source, "train_dataloader", set_states, key=_KEY)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what this run asks for, before it is replaced by what the checkpoint has.

        Of a sharded model, the checkpoint is loaded after this.
        """
        self._settings = _asked_for(trainer)
        _refuse_other_settings(self._loaded.get("settings", {}), self._settings)
        refuse = partial(_refuse_fewer_states, trainer)
        strategy: Any = trainer.strategy
        register_after(strategy, "load_optimizer_state_dict", refuse, key=_KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded, self._loaded = self._loaded, {}
        _refuse_other_settings(loaded.get("settings", {}), self._settings)
        if loaded and len(loaded["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is of {len(loaded['ranks'])} processes, and this run has "
                f"{trainer.world_size}: its random numbers differ from an uninterrupted run's."
            )
        if loaded.get("within_epoch") and compat.restarts_silently(trainer):
            rank_zero_warn(
                "The checkpoint was written within an epoch, and the training loader has no "
                "load_state_dict: the rest of the epoch has other batches than in an uninterrupted "
                "run. Give it one, or resume from the end of an epoch."
            )
        _set_once(self._random, trainer.strategy.root_device)
        self._sums = compat.add_training_sums(trainer, self._sums)
        if self._own_sums:
            pl_module.load_training_sums(self._own_sums)  # type: ignore[operator]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Add the sums to those of metrics that the first batch has made."""
        if self._sums:
            self._sums = compat.add_training_sums(trainer, self._sums)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget sums that are no longer logged."""
        self._sums = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the random numbers, of which training draws on as if there were no validation."""
        self._before_validation = random_states(trainer.strategy.root_device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_random_states(self._before_validation, trainer.strategy.root_device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states of all processes, and what this run asked for."""
        within_epoch = count_batches_done(trainer) > 0
        if within_epoch:  # Lightning takes an epoch that max_time or max_steps cuts for a whole one
            for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                done = count["started"] - 1
                count |= {x: min(count[x], done) for x in ("processed", "completed")}
        mine: dict[str, Any] = {
            "random": random_states(trainer.strategy.root_device),
            "sums": {**self._sums, **compat.training_sums(trainer)} if within_epoch else {},
            "own_sums": getattr(pl_module, "training_sums", dict)(),
        }
        ranks = [mine] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(ranks, mine)
        checkpoint[_KEY] = {
            "ranks": ranks,
            "within_epoch": within_epoch,
            "settings": self._settings,
        }


RandomStates = dict[str, Tensor]


def random_states(device: torch.device) -> RandomStates:
    """Return the states of torch, of its CUDA device, of numpy and of Python, as tensors."""
    _, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    assert kind == "MT19937", "numpy's own generator"
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_gauss": torch.tensor(rest, dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: RandomStates, device: torch.device) -> None:
    """Set them; a device that has none of its own in there is left."""
    states = {name: state.cpu() for name, state in states.items()}
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = states["numpy_gauss"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _set_once(states: list[RandomStates], device: torch.device, *_: Any) -> None:
    while states:
        set_random_states(states.pop(), device)


# How a step is computed, not what it computes.
_HOW = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


def _asked_for(trainer: pl.Trainer) -> dict[str, Any]:
    """Return, by name, the seed and the options of optimizers and schedules, as plain values."""
    asked: dict[str, Any] = {} if compat.global_seed() is None else {"seed": compat.global_seed()}
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        for number, group in enumerate(optimizer.param_groups):
            place = f"{name} group {number}" if len(optimizer.param_groups) > 1 else name
            options = {**group, "lr": group.get("initial_lr", group.get("lr"))}
            options.pop("initial_lr", None)
            asked |= {f"{place} {k}": v for k, v in options.items() if k not in _HOW}
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        names = inspect.signature(type(schedule).__init__).parameters.keys() - {"last_epoch"}
        asked |= {
            f"{type(schedule).__name__} {name}": getattr(schedule, name)
            for name in sorted(names)
            if hasattr(schedule, name)
        }
    plain = {name: _plain(value) for name, value in asked.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return a number, a text or a list of those; None of everything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Counter):
        return sorted(value.elements())
    if isinstance(value, list | tuple) and all(isinstance(x, int | float | str) for x in value):
        return list(value)
    return value if isinstance(value, int | float | str) else None


def _refuse_other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    names = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    there, here = (", ".join(f"{n} {each[n]}" for n in names) for each in (theirs, ours))
    classes = [sorted({n.partition(" ")[0] for n in x} - {"seed"}) for x in (theirs, ours)]
    if theirs and classes[0] != classes[1]:
        there, here = (" and ".join(each) or "none" for each in classes)
    if there != here:
        raise InputError(
            f"The checkpoint's run has {there}, and this one asks for {here}: give the same, {ANEW}"
        )


ANEW = "or start from its weights with nmlightning.load_from_checkpoint."


def _refuse_fewer_states(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError if Lightning, which loads what there is, has left an optimizer as new."""
    states, ours = len(checkpoint["optimizer_states"]), len(trainer.optimizers)
    if states != ours:
        raise InputError(
            f"The checkpoint has the state of {states} optimizers, and this run has {ours}: give "
            f"one of the whole run, {ANEW}"
        )

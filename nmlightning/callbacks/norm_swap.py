"""NormSwap, and the base of the callbacks that change a model before it is trained."""

import functools
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nmlightning import compat
from nmlightning.errors import InputError, check_lists, describe_arguments
from nmlightning.kernels.cpu.build import BEING_BUILT, NOT_BUILT, cache_folder, start_build
from nmlightning.kernels.dispatch import FORMULA, NO_KERNELS
from nmlightning.kernels.interface import layout_of
from nmlightning.norms import registry
from nmlightning.norms.batch_norm_base import as_plain, describe_norm
from nmlightning.optim.norm_guard import guard_norms
from nmlightning.surgery import recipes
from nmlightning.surgery.fuse.fuse import unfused
from nmlightning.surgery.norm_layers import find_norm_layers
from nmlightning.surgery.swap import SwapReport, swap_norms


class ModelChange(compat.CallbackBase):
    """Changes the LightningModule when the Trainer sets it up, and keeps that in checkpoints.

    It is done before the optimizer exists and before weights are loaded; where the net is built
    in `configure_model`, at the end of that; and callbacks that copied the module copy it again.
    """

    keeps_picklable = True  # whether a changed module can be sent to a process that is spawned

    settings: Mapping[str, Any]  # the keywords, as plain data

    @abstractmethod
    def change(self, module: nn.Module) -> bool:
        """Change the module, keep that in its checkpoints, and return whether it did anything."""

    @abstractmethod
    def would_change(self, module: nn.Module) -> bool:
        """Return whether `change` would do anything."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_arguments(self, known=self.settings)})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Change the module, or have it done when `configure_model` has built it."""
        strategy = compat.copying_strategy(trainer)
        late = compat.builds_in_configure_model(pl_module)
        if late:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # A connector sets them.
            changes = [callback for callback in callbacks if isinstance(callback, ModelChange)]
            change_all = functools.partial(_change_all, changes, pl_module, strategy)
            recipes.register_after(pl_module, "configure_model", change_all, key="change")
        try:
            changed = self.change(pl_module)
        except InputError:
            if not late:
                raise
            changed = False  # It may fit what configure_model is yet to build, or raise there.
        self.check_is_kept(changed, strategy)
        if changed:
            compat.rebuild_copies(trainer, pl_module, before=self, stage=stage)

    def check_launch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise InputError, before processes train copies, as `setup` would in each of them."""
        changes = False
        with suppress(InputError):  # such as of a net that is yet to be built
            changes = self.would_change(pl_module)
        self.check_is_kept(changes, compat.copying_strategy(trainer))

    def check_is_kept(self, changed: bool, strategy: str | None) -> None:
        """Raise InputError where a copy of the module was changed, by the name of its strategy."""
        if changed and strategy:
            name = type(self).__name__
            can_be_sent = self.keeps_picklable or not strategy.startswith("ddp_spawn")
            before = f", or call {name}(…).change(module) before trainer.fit, too"
            raise InputError(
                f"The strategy {strategy} trains copies of the module, and {name} would not change "
                f'yours: use strategy="ddp"{before if can_be_sent else ""}.'
            )

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint, one for all the same settings."""
        return self._generate_state_key(**self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, so that Lightning warns of a resume without this callback."""
        return {**self.settings}


def _change_all(changes: Sequence[ModelChange], module: nn.Module, strategy: str | None) -> None:
    for change in changes:
        change.check_is_kept(change.change(module), strategy)


def warn_of_forgotten(
    what: str, optimizers: Sequence[Optimizer], modules: Mapping[str, nn.Module]
) -> None:
    """Warn of trainable parameters of the modules, by name, that no optimizer has."""
    optimized = {id(q) for o in optimizers for g in o.param_groups for q in g["params"]}
    forgotten = [
        f"{name}.{own_name}"
        for name, module in modules.items()
        for own_name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in optimized
    ]
    if optimized and forgotten:
        rank_zero_warn(
            f"No optimizer trains {len(forgotten)} parameters of {what}, such as {forgotten[0]}; "
            "if that is meant, set their requires_grad to False."
        )


class LayerChange(ModelChange):
    """Changes layers, checks in training that they stay, and logs once what computes them.

    `Trainer(sync_batchnorm=True)` lets the norms among them share their statistics.
    """

    _unchecked = False
    _unnoted: Mapping[str, nn.Module] = {}  # by name
    _note: "BackendNote | None" = None

    @abstractmethod
    def find_changed(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """Return the changed layers by name, or raise InputError if one was replaced."""

    def describe_note(
        self, note: "BackendNote", trainer: pl.Trainer, module: nn.Module
    ) -> list[str]:
        """Return what to log of the first batch."""
        return note.describe()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Change the module, as the base does, and let `sync_batchnorm` keep its norms."""
        compat.keep_through_sync(trainer, unfused)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing replaced a layer, and share statistics if that is asked."""
        compat.synchronise_norms(trainer, pl_module)
        self._unnoted = self.find_changed(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the layers checked once more when this epoch's first forward is over."""
        self._unchecked = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Have what computes the layers noted in the first batch."""
        if self._unnoted:
            self._note, self._unnoted = BackendNote(pl_module, self._unnoted), {}

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Check, before a step is taken, that no other hook replaced a layer, and log the note."""
        if self._unchecked:
            self._unchecked = False
            self.find_changed(pl_module)
        if self._note is not None:
            note, self._note = self._note, None
            for line in self.describe_note(note, trainer, pl_module):
                rank_zero_info(f"{type(self).__name__}: {line}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check for what happened since the first step."""
        self.find_changed(pl_module)


class NormSwap(LayerChange):
    """Swaps the norm layers of the LightningModule when the Trainer sets it up.

    It works with `pytorch_lightning` and `lightning.pytorch`, with nets built in `__init__` or in
    `configure_model`, with any optimizer, and anywhere among the callbacks. Checkpoints hold what
    the norms are under the key `nmlightning`: a resume with others is refused, and
    `nmlightning.load_from_checkpoint` restores the swapped model without a Trainer.
    `Trainer(sync_batchnorm=True)` synchronises the swapped norms.

    The keywords are those of `nmlightning.swap_norms`.

    Args:
        norm: `l1`, `linf`, `top10`, `topk`, `lp`, `range`, `mean`, `half_l2`, `scaled`,
            `dyt`, `derf`, or `l2`, torch's own.
        options: the norm's constructor options, such as `constant` or `k`.
        kinds: `batch`, `layer`, `rms` or several.
        include: glob patterns on the names of modules in the LightningModule; empty means all.
        exclude: glob patterns on names of modules that are not swapped.
        fuse: "relu" lets batch norms do the ReLU after them, "add_relu" also an addition and the
            ReLU after that. Checkpoints do not hold it: a run may resume with another.
        types: other classes that are "layer", "rms" or "batch" norms, by class or path.

    Raises:
        InputError: on construction for an unknown norm, kind, option or `fuse`; in setup for a
            pattern that matches nothing or a model without such norms; on resuming with other
            norms; in training, if something replaced one since, such as a call of
            `SyncBatchNorm.convert_sync_batchnorm`.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormSwap("l1")], logger=False)
    """

    def __init__(
        self,
        norm: str = "l1",
        options: dict[str, Any] | None = None,
        kinds: Sequence[str] | str = ("batch",),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fuse: str | None = None,
        types: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_lists(include=include, exclude=exclude)
        chosen = registry.check_kinds(kinds)
        for kind in chosen:
            registry.check_options(norm, kind, options or {})
        self.fuse = registry.check_fuse(fuse, norm, chosen)
        self.settings = {
            "norm": registry.norm_name(norm),
            "options": {option: as_plain(value) for option, value in (options or {}).items()},
            "kinds": list(chosen),
            "include": list(include),
            "exclude": list(exclude),
            **({"types": registry.check_types(types)} if types else {}),
        }
        self._made: dict[str, str] = {}  # the classes of our norms by name, after the last swap
        self.backends: list[str] = []  # which have computed the norms, here or before a resume
        self.builds_kernels = False  # in the background, if the CPU's are missed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing replaced a swapped layer, and that an optimizer trains it."""
        swaps = [c for c in trainer.callbacks if isinstance(c, NormSwap)]  # type: ignore[attr-defined]
        if self is not swaps[-1]:  # which knows what all made
            self._made = {}
        super().on_fit_start(trainer, pl_module)
        warn_of_forgotten("swapped norms", trainer.optimizers, self._unnoted)

    def describe_note(
        self, note: "BackendNote", trainer: pl.Trainer, module: nn.Module
    ) -> list[str]:
        """Return that, whether the kernels are built now, and whether a resume differs."""
        lines, backends = note.describe(), sorted(note.backends)
        if self.builds_kernels and any(NOT_BUILT in line for line in lines):
            reason = start_build(cache_folder()) if trainer.is_global_zero else BEING_BUILT
            lines = [line.replace(NOT_BUILT, reason) for line in lines]
        if self.backends not in ([], backends):
            then, now = (" and ".join(names) for names in (self.backends, backends))
            lines.append(f"{now} resumes a run by {then}: equal to rounding, not bit for bit")
        self.backends = backends
        return lines

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "backends": self.backends}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.backends = state_dict.get("backends", [])

    def would_change(self, module: nn.Module) -> bool:
        """Return whether norms would be swapped or fused."""
        report = self._swap(module, dry_run=True)
        return bool(report.swapped or report.fused)

    def _swap(self, module: nn.Module, *, dry_run: bool = False) -> SwapReport:
        return swap_norms(module, **self.settings, fuse=self.fuse, dry_run=dry_run)

    def change(self, module: nn.Module) -> bool:
        """Swap the norms of `module`, and return whether that did anything."""
        report = self._swap(module)
        recipes.keep_in_checkpoints(module)
        norms = find_norm_layers(module)
        self._made = {x.name: x.type_name for x in norms if describe_norm(x.module) is not None}
        changed = bool(report.swapped or report.fused)
        if changed:
            rank_zero_info(f"NormSwap: {report.describe()}")
        return changed

    def find_changed(self, module: nn.Module) -> Mapping[str, nn.Module]:
        layers = {layer.name: layer for layer in find_norm_layers(module)}
        for name, expected in self._made.items():
            if name not in layers or layers[name].type_name != expected:
                now = layers[name].type_name if name in layers else "gone"
                way_out = "let that run before NormSwap."
                if now == "SyncBatchNorm":
                    way_out = (
                        "Trainer(sync_batchnorm=True) synchronises swapped norms and keeps them."
                    )
                raise InputError(
                    f"NormSwap made {name} {expected}, but it is {now}: something replaced it "
                    f"after the swap; {way_out}"
                )
        return {name: layers[name].module for name in self._made}


class NormGuard(compat.CallbackBase):
    """Keeps running statistics where AMP skips a step or a batch is not finite: `guard_norms`.

    It swaps nothing: the norms of the LightningModule stay torch's own, and are guarded from the
    start of the fit to its end.

    Raises:
        InputError: at the start of a fit, if the module has no norm with running statistics.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormGuard()], logger=False)
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._guard = guard_norms(pl_module, getattr(trainer.precision_plugin, "scaler", None))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if "_guard" in vars(self):
            vars(self).pop("_guard").remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, _: Any) -> None:
        self.teardown(trainer, pl_module, "fit")


class BackendNote:
    """Asks each norm once, when it gets its first batch, which backend computes it.

    A network that is compiled in whole or in part is not asked, since a hook would be traced.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._answers: dict[nn.Module, str] = {}
        self.backends: set[str] = set()
        self._handles: list[RemovableHandle] = []
        parts = list(model.modules())
        compiled = any(p._compiled_call_impl or hasattr(p, "_orig_mod") for p in parts)
        for layer in dict.fromkeys(layers.values()):
            if compiled:
                self.backends.add(FORMULA)
                self._answers[layer] = f"{type(layer).__name__} by the formula, compiled"
            else:
                self._handles.append(layer.register_forward_pre_hook(self._ask))

    def describe(self) -> list[str]:
        """Return a line for each backend, class, dtype and layout, and ask no more."""
        for handle in self._handles:
            handle.remove()
        return [f"{count} {answer}" for answer, count in Counter(self._answers.values()).items()]

    def _ask(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer in self._answers or not inputs:
            return
        x = inputs[0]
        layout = "strided" if (known := layout_of(x)) == "other" else known
        where = layout if x.dim() > 3 or layout == "strided" else "contiguous"
        what = f"{str(x.dtype).removeprefix('torch.')}, {where}"
        backend_for = getattr(layer, "backend_for", None)  # torch's own norms have none
        dispatch = backend_for(x) if backend_for else NO_KERNELS
        by_formula = f"by the formula ({what}): {dispatch.reason}"
        by = by_formula if dispatch.kernels is None else f"by {dispatch.backend} kernels ({what})"
        self._answers[layer] = f"{type(layer).__name__} {by}"
        self.backends.add(dispatch.backend)

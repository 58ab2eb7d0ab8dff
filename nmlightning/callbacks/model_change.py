"""The base of the callbacks that change a model before it is trained."""

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from nmlightning import compat
from nmlightning.errors import InputError
from nmlightning.surgery.recipes import Recipe, keep_in_checkpoints, register_after


class ModelChange(compat.CallbackBase):
    """Changes the LightningModule when the Trainer sets it up, and keeps that in checkpoints.

    It is done before the optimizer exists and before weights are loaded; where the net is built
    in `configure_model`, at the end of that; and callbacks that copied the module copy it again.
    """

    keeps_picklable = True  # whether a changed module can be sent to a process that is spawned

    @abstractmethod
    def change(self, module: nn.Module) -> bool:
        """Change the module, note the recipe on it, and return whether that did anything."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """Return the keywords as plain data."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Change the module, or have it done when `configure_model` has built it."""
        strategy = compat.copying_strategy(trainer)
        late = compat.builds_in_configure_model(pl_module)
        if late:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # A connector sets them.
            changes = [callback for callback in callbacks if isinstance(callback, ModelChange)]
            change_all = functools.partial(_change_all, changes, pl_module, strategy)
            register_after(pl_module, "configure_model", change_all, key="change")
        keep_in_checkpoints(pl_module)
        try:
            changed = self.change(pl_module)
        except InputError:
            if not late:
                raise
            changed = False  # It may fit what configure_model is yet to build, or raise there.
        self.check_is_kept(changed, strategy)
        if changed:
            compat.rebuild_copies(trainer, pl_module, before=self, stage=stage)

    def check_is_kept(self, changed: bool, strategy: str | None) -> None:
        """Raise InputError where a copy of the module was changed, by the name of its strategy."""
        if changed and strategy:
            name = type(self).__name__
            can_be_sent = self.keeps_picklable or not strategy.startswith("ddp_spawn")
            before = f", or call {name}(…).change(module) before trainer.fit, too"
            raise InputError(
                f"{name} changes the module in the processes of the strategy {strategy}, which "
                "are copies, and yours would stay as it is: use "
                f'strategy="ddp"{before if can_be_sent else ""}.'
            )

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint, one for each recipe."""
        return self._generate_state_key(**self.recipe())

    def state_dict(self) -> dict[str, Any]:
        """Return the recipe, so that Lightning warns of a resume without this callback."""
        return self.recipe()


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

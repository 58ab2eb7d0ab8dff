"""NormSwap: train a model that exists already with another norm."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from nmlightning.after_method import run_after
from nmlightning.compat import (
    CallbackBase,
    builds_in_configure_model,
    keep_through_sync,
    rebuild_copies,
)
from nmlightning.errors import InputError
from nmlightning.name_patterns import check_lists
from nmlightning.norms.registry import check_kinds, check_options
from nmlightning.recipes import (
    Recipe,
    keep_in_checkpoints,
    make_recipe,
    note_recipe,
    swapped_modules,
)
from nmlightning.surgery import swap_norms
from nmlightning.swappable import NormLayer, find_norm_layers

if TYPE_CHECKING:
    import pytorch_lightning as pl


class NormSwap(CallbackBase):
    """Swaps the norm layers of the LightningModule when the Trainer sets it up.

    It works for every LightningModule, of `pytorch_lightning` and of `lightning.pytorch`, whether
    the net is built in `__init__` or in `configure_model`, with any optimizer, and wherever it
    stands among the callbacks. What it did travels in every checkpoint under the key `nmlightning`:
    a resume with another recipe is refused, and `nmlightning.load_from_checkpoint` restores the
    swapped model without a Trainer. `Trainer(sync_batchnorm=True)` synchronises the swapped norms.

    The keywords are those of `nmlightning.swap_norms`.

    Args:
        norm: `l1`, `linf`, `top10`, `topk`, `lp`, or `l2` for torch's own.
        options: the norm's constructor options, such as `constant` or `k`.
        kinds: `batch`, `layer` or both.
        include: glob patterns on the names of modules in the LightningModule; empty means all.
        exclude: glob patterns on names that are left alone.

    Raises:
        InputError: on construction for an unknown norm, kind or option; in setup for a pattern
            that matches nothing or a model without such norms; on resuming with another recipe;
            when training starts, if something replaced a swapped layer since.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[NormSwap("l1")], logger=False)
    """

    def __init__(
        self,
        norm: str = "l1",
        options: dict[str, Any] | None = None,
        kinds: Sequence[str] = ("batch",),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_lists(kinds=kinds, include=include, exclude=exclude)
        for kind in check_kinds(tuple(kinds)):
            check_options(norm, kind, options or {})
        self.norm = norm
        self.options: Mapping[str, Any] = dict(options or {})
        self.kinds = tuple(kinds)
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Swap before the optimizer exists and before any weights are loaded."""
        late = builds_in_configure_model(pl_module)
        if late:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # A connector sets them.
            swaps = [callback for callback in callbacks if isinstance(callback, NormSwap)]
            swap_all = functools.partial(_swap_all, swaps, pl_module)
            run_after(pl_module, "configure_model", swap_all, key="swap")
        keep_in_checkpoints(pl_module)
        keep_through_sync(trainer)
        try:
            swapped = self.swap(pl_module)
        except InputError:
            if not late:
                raise
            swapped = False  # It may fit what configure_model is yet to build, or raise there.
        if swapped:
            rebuild_copies(trainer, pl_module, before=self, stage=stage)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Check that nothing replaced a swapped layer, and that an optimizer trains it."""
        layers = {layer.name: layer for layer in find_norm_layers(pl_module)}
        for name, expected in swapped_modules(pl_module).items():
            if name not in layers or layers[name].type_name != expected:
                now = layers[name].type_name if name in layers else "gone"
                raise InputError(
                    f"NormSwap made {name} a {expected}, but it is {now}: something replaced it "
                    "after the swap; let that run before NormSwap."
                )
        _warn_of_forgotten(
            trainer.optimizers, [layers[name] for name in swapped_modules(pl_module)]
        )

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint, one for each recipe."""
        return self._generate_state_key(**self.recipe())

    def state_dict(self) -> dict[str, Any]:
        """Return the recipe, so that Lightning warns of a resume without this callback."""
        return self.recipe()

    def swap(self, module: nn.Module) -> bool:
        """Swap the norms of `module`, note it there, and return whether that did anything."""
        report = swap_norms(
            module,
            self.norm,
            self.options,
            kinds=self.kinds,
            include=self.include,
            exclude=self.exclude,
        )
        note_recipe(module, self.recipe(), {swap.name: swap.after for swap in report.swapped})
        if report.swapped:
            rank_zero_info(f"NormSwap: {report}")
        return bool(report.swapped)

    def recipe(self) -> Recipe:
        """Return the keywords as plain data."""
        return make_recipe(self.norm, self.options, self.kinds, self.include, self.exclude)


def _swap_all(swaps: Sequence[NormSwap], module: nn.Module) -> None:
    for swap in swaps:
        swap.swap(module)


def _warn_of_forgotten(optimizers: list[Optimizer], layers: list[NormLayer]) -> None:
    """Warn of trainable parameters of `layers` that no optimizer has."""
    optimized = {id(q) for o in optimizers for g in o.param_groups for q in g["params"]}
    forgotten = [
        f"{layer.name}.{name}"
        for layer in layers
        for name, parameter in layer.module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in optimized
    ]
    if optimized and forgotten:
        rank_zero_warn(
            f"No optimizer trains {len(forgotten)} parameters of swapped norms, such as "
            f"{forgotten[0]}; if that is meant, set their requires_grad to False."
        )

"""WeightNormSwap: train a model that exists already with weights that are normalised."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn

from nmlightning.callbacks.norm_swap import ModelChange, warn_of_forgotten
from nmlightning.compat import stands_behind
from nmlightning.errors import InputError, check_lists
from nmlightning.kernels.cpu.backend import CpuBackend, first_missing
from nmlightning.kernels.cpu.build import BEING_BUILT, NOT_BUILT, cache_folder, start_build
from nmlightning.parametrizations import WeightNorm, apply_weight_norm
from nmlightning.parametrizations.layers import (
    LayerKind,
    choose_layers,
    find_weights,
    normalised_weights,
)
from nmlightning.parametrizations.optimizers import live_optimizers
from nmlightning.parametrizations.weight_norm import Gain, Kind, Settings
from nmlightning.surgery.recipes import keep_in_checkpoints


class WeightNormSwap(ModelChange):
    """Normalises weights of the LightningModule when the Trainer sets it up.

    It works with every LightningModule, also beside `NormSwap`. Checkpoints hold the settings of
    each weight under the key `nmlightning`: a resume with others is refused, and
    `nmlightning.load_from_checkpoint` restores the model without a Trainer.

    The keywords, but for `cache`, are those of `nmlightning.apply_weight_norm`. Existing optimizers
    train the gains, too.

    Args:
        kind: "bounded" or "weight".
        p: 1, 2 or "inf".
        rho: "init", or a number: ρ, and the norm that gains begin with.
        gain: "none", "channel" or "layer"; None means what the kind has by default.
        project: bring the unnormalised weight of each channel to ρ now and after each step.
        layers: kinds of layers, whose weights are normalised but for the output layer's: "conv",
            "linear", "recurrent", "embedding". None means convolutions, or none where `include`
            names weights.
        include: glob patterns on names of parameters that are normalised as well.
        exclude: glob patterns on names of parameters that are not normalised.
        cache: without effect; configs that older runs saved have it.

    Raises:
        InputError: on construction for a setting that is not allowed; in setup for a pattern that
            matches nothing or a weight that cannot be normalised; on resuming with other settings;
            when training starts, if something replaced a normalised weight since.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[WeightNormSwap("bounded", p=1)], logger=False)
    """

    keeps_picklable = False  # torch pickles no parametrized module

    def __init__(
        self,
        kind: Kind = "bounded",
        p: float | str = 2,
        rho: float | str = "init",
        gain: Gain | None = None,
        project: bool = False,
        layers: Sequence[LayerKind] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        cache: bool | None = None,
    ) -> None:
        super().__init__()
        check_lists(layers=layers or (), include=include, exclude=exclude)
        self._norm = Settings.of(kind, p, rho, gain, project)
        choose_layers(layers, include)  # raises where a kind is not known
        chosen = {"include": list(include), "exclude": list(exclude)}
        self._which: dict[str, Any] = {"layers": list(layers) if layers else None, **chosen}
        self.settings = {**self._norm.as_plain(), **self._which}
        self._made: Iterable[str] = ()  # the names of normalised weights
        self.builds_kernels = False  # in the background, if the CPU's are missed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Change the module, as the base does; ModelPruning may not stand before this."""
        if stands_behind(trainer, self, "ModelPruning"):
            raise InputError(
                "ModelPruning stands before WeightNormSwap and chose weights that are computed "
                "from others now: put WeightNormSwap before it in the callbacks."
            )
        super().setup(trainer, pl_module, stage)

    def change(self, module: nn.Module) -> bool:
        """Normalise weights of `module`, and return whether that did anything."""
        if changed := self.would_change(module):
            report = apply_weight_norm(module, **self.settings, optimizers=live_optimizers(module))
            rank_zero_info(f"WeightNormSwap: {report.describe()}")
        keep_in_checkpoints(module)
        self._made = normalised_weights(module)
        return changed

    def would_change(self, module: nn.Module) -> bool:
        """Return whether this has not been done yet."""
        if not (known := normalised_weights(module)):
            return True
        with warnings.catch_warnings():  # which the change gave
            warnings.simplefilter("ignore")
            chosen = find_weights(module, **self._which).chosen
        return any(known.get(weight.name) != self._norm for weight in chosen)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing replaced a normalised weight, and that an optimizer trains it."""
        names = normalised_weights(pl_module)
        for name in self._made:
            if name not in names:
                raise InputError(
                    f"WeightNormSwap normalised {name}, but something replaced it since: let that "
                    "run before WeightNormSwap."
                )
        norms = {n: m for n, m in pl_module.named_modules() if isinstance(m, WeightNorm)}
        warn_of_forgotten("weight norms", trainer.optimizers, norms)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self.builds_kernels and on_cpu and first_missing(CpuBackend()) == NOT_BUILT:
            reason = start_build(cache_folder()) if trainer.is_global_zero else BEING_BUILT
            rank_zero_info(f"WeightNormSwap: {len(norms)} weights by the formula: {reason}")

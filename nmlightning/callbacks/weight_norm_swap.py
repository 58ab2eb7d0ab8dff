"""WeightNormSwap: train a model that exists already with weights that are normalised."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import nn

from nmlightning.callbacks.norm_swap import ModelChange, warn_of_forgotten
from nmlightning.compat import stands_behind
from nmlightning.errors import InputError, check_lists, describe_arguments
from nmlightning.kernels.cpu.backend import CpuBackend, first_missing
from nmlightning.kernels.cpu.build import BEING_BUILT, NOT_BUILT, cache_folder, start_build
from nmlightning.parametrizations import WeightNorm, apply_weight_norm
from nmlightning.parametrizations.layers import LayerKind, normalised_weights
from nmlightning.parametrizations.optimizers import live_optimizers
from nmlightning.parametrizations.weight_norm import Gain, Kind
from nmlightning.surgery import recipes


class WeightNormSwap(ModelChange):
    """Normalises weights of the LightningModule when the Trainer sets it up.

    It works with every LightningModule, also beside `NormSwap`. Checkpoints hold its recipe under
    the key `nmlightning`: a resume with another recipe is refused, and
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
            matches nothing or a weight that cannot be normalised; on resuming with another recipe;
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
        self._settings: dict[str, Any] = {
            "kind": kind,
            "p": p,
            "rho": rho,
            "gain": gain,
            "project": project,
            "layers": None if layers is None else tuple(layers),
            "include": tuple(include),
            "exclude": tuple(exclude),
        }
        self.recipe()  # raises where a setting is not allowed
        self.builds_kernels = False  # in the background, if the CPU's are missed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_arguments(self, known=self._settings)})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Change the module, as the base does; ModelPruning may not stand before this."""
        if stands_behind(trainer, self, "ModelPruning"):
            raise InputError(
                "ModelPruning stands before WeightNormSwap and chose weights that are computed "
                "from others now: put WeightNormSwap before it in the callbacks."
            )
        super().setup(trainer, pl_module, stage)

    def change(self, module: nn.Module) -> bool:
        """Normalise weights of `module`, note it there, and return whether that did anything."""
        if not self.would_change(module):
            return False
        report = apply_weight_norm(module, **self._settings, optimizers=live_optimizers(module))
        recipes.note_recipe(module, self.recipe(), report.weights, recipes.WEIGHT_NORM)
        rank_zero_info(f"WeightNormSwap: {report.describe()}")
        return True

    def would_change(self, module: nn.Module) -> bool:
        """Return whether this has not been done yet."""
        recipe, noted = self.recipe(), recipes.recipes_of(module, recipes.WEIGHT_NORM)
        return not any(recipe.items() <= note.items() for note in noted)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing replaced a normalised weight, and that an optimizer trains it."""
        names = normalised_weights(pl_module)
        for name in recipes.changed_modules(pl_module, recipes.WEIGHT_NORM):
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

    def recipe(self) -> recipes.Recipe:
        return recipes.make_weight_norm_recipe(**self._settings)

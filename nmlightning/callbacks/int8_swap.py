"""Int8Swap: train a model that exists already in 8 bits or fewer."""

from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from nmlightning.callbacks.norm_swap import BackendNote, LayerChange
from nmlightning.errors import InputError, check_lists
from nmlightning.int8.layers import Int8Layer, WeightGradient, WeightRange
from nmlightning.int8.quantizer import Rounding
from nmlightning.int8.ranges import options_of
from nmlightning.name_patterns import some
from nmlightning.surgery.int8 import check_settings, swap_int8


class Int8Swap(LayerChange):
    """Lets the LightningModule compute in 8 bits or fewer, from when the Trainer sets it up.

    It works with every LightningModule, also beside `NormSwap`, whose batch norms are then
    quantised, and `WeightNormSwap`, anywhere among the callbacks. Checkpoints hold the options of
    each layer under the key `nmlightning`: a resume with others is refused, and
    `nmlightning.load_from_checkpoint` restores the model without a Trainer.
    `Trainer(sync_batchnorm=True)` also shares the ranges among ranks.

    The keywords are those of `nmlightning.swap_int8`.

    Args:
        bits: of the input and the weight of each layer, 2 … 8.
        gradient_bits: of the output's gradient, for the input's gradient.
        rounding: of that gradient, "stochastic" or "nearest".
        bifurcate: whether the weight's gradient is kept from being quantised.
        weight_gradient: the dtype that it is computed in, "float32" or "bfloat16".
        include: glob patterns on names of layers and batch norms; empty means all.
        exclude: glob patterns on names of those that stay in floating point.
        norms: what torch's own batch norms become; all batch norms are quantised. None leaves
            norms alone.
        weight_range: one scale of a weight for the "tensor", or for each output "channel".
        momentum: of the newest batch in the running ranges of the inputs.
        sync: share the ranges of a batch and of its gradient among all ranks.

    Raises:
        InputError: on construction for a setting that is not allowed; in setup for a pattern that
            matches nothing or a model without such layers; on resuming with other options; in
            training, if something replaced a layer since.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[Int8Swap(gradient_bits=4)], logger=False)
    """

    def __init__(
        self,
        bits: int = 8,
        gradient_bits: int = 8,
        rounding: Rounding = "stochastic",
        bifurcate: bool = True,
        weight_gradient: WeightGradient = "float32",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        norms: str | None = "range",
        weight_range: WeightRange = "tensor",
        momentum: float | None = 0.1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_lists(include=include, exclude=exclude)
        options = {
            "bits": bits,
            "gradient_bits": gradient_bits,
            "rounding": rounding,
            "bifurcate": bifurcate,
            "weight_gradient": weight_gradient,
            "weight_range": weight_range,
            "momentum": momentum,
            "sync": sync,
        }
        check_settings(options, norms)
        chosen = {"include": list(include), "exclude": list(exclude), "norms": norms}
        self.settings = {**options, **chosen}

    def change(self, module: nn.Module) -> bool:
        """Let layers of `module` compute in int8, and return whether that did anything."""
        report = swap_int8(module, **self.settings)
        if report.swapped:
            rank_zero_info(f"Int8Swap: {report.describe()}")
        return bool(report.swapped)

    def would_change(self, module: nn.Module) -> bool:
        """Return whether any layer or norm is not so yet."""
        return bool(swap_int8(module, **self.settings, dry_run=True).swapped)

    def describe_note(self, note: BackendNote, trainer: pl.Trainer, module: nn.Module) -> list[str]:
        """Return that, and warn of layers that do not compute."""
        modules = module.named_modules()
        idle = [n for n, x in modules if options_of(x) and not x.num_ranges_tracked]
        if idle:
            rank_zero_warn(
                f"Int8Swap: nothing called {some(idle, 3)} in the first batch: what reads its "
                "weight instead computes in floating point."
            )
        return note.describe()

    def find_changed(self, module: nn.Module) -> Mapping[str, nn.Module]:
        report = swap_int8(module, **self.settings, dry_run=True)
        if report.swapped:
            changed = report.swapped[0]
            way_out = "something replaced it after the swap; let that run before Int8Swap."
            if "(" in changed.after:  # other options
                way_out = "give each layer to one Int8Swap, by include and exclude."
            raise InputError(
                f"Int8Swap made {changed.name} {changed.after}, but it is {changed.before}: "
                f"{way_out}"
            )
        return {n: x for n, x in module.named_modules() if isinstance(x, Int8Layer)}

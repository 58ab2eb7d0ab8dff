"""The recorded norms that a rule follows, on the weight's device and at the run's moment."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nmlightning.errors import InputError
from nmlightning.weights.history import Alignment, NormHistory
from nmlightning.weights.steering.steered_weight import SteeredWeight

Moment = Mapping[str, float]
"""`{"step": …}` or `{"epoch": …}`, as `NormHistory.place` takes it."""


class Reference:
    """The norms of one recording, for the weights that are steered by it.

    Args:
        source: a recording, its file, or the folder of the run that made it.
        weights: what is steered.
        align: how a moment finds its record; see `NormHistory.place`.

    Attributes:
        dead: how many channels of each weight have no usable norm at the last moment asked for.

    Raises:
        InputError: a recording that cannot be read, or of another model.
    """

    def __init__(
        self, source: NormHistory | str | Path, weights: Iterable[SteeredWeight], align: Alignment
    ) -> None:
        self.history = source if isinstance(source, NormHistory) else NormHistory.load(source)
        self.align = align
        self.history.check_weights({self._recorded(w): w.channels for w in weights})
        if not len(self.history):
            raise InputError("The recording is empty.")
        self.dead: dict[str, int] = {}
        self._latest: dict[str, tuple[tuple[int, int, float], Tensor]] = {}

    def norms(self, weight: SteeredWeight, moment: Moment) -> Tensor:
        """Return the (C,) recorded norms of this rank's channels, in the dtype of its norms."""
        step, epoch = moment.get("step"), moment.get("epoch")
        place = self.history.place(
            step=None if step is None else int(step), epoch=epoch, align=self.align
        )
        known = self._latest.get(weight.name)
        if known is None or known[0] != place:
            below, above, share = place
            records = torch.from_numpy(self.history.norms[self._recorded(weight)][[below, above]])
            first, second = records.to(weight.norms_dtype)
            norms = torch.lerp(first, second, share)
            self._note_dead(weight.name, norms)
            known = self._latest[weight.name] = place, weight.local_channels(norms)
        return known[1]

    def _recorded(self, weight: SteeredWeight) -> str:
        """Return the name of its norms: those of what is hidden behind a normalised weight."""
        hidden = f"{weight.name}_v"
        return hidden if hidden in self.history.norms else weight.name

    def _note_dead(self, name: str, norms: Tensor) -> None:
        dead = int((~usable(norms)).sum())
        if dead > self.dead.get(name, 0):
            warnings.warn(
                f"{dead} of {len(norms)} channels of {name} have a recorded norm that is zero or "
                "not finite; they are left unsteered.",
                stacklevel=2,
            )
        self.dead[name] = dead


def usable(norms: Tensor) -> Tensor:
    """Return (C,) bool: where a recorded norm can be followed."""
    return (norms > 0) & norms.isfinite()

"""Weights of an optimizer as a rule sees them: channels, state, step operations, recorded norms."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer, RMSprop

from nmlightning.errors import InputError, check_choice, check_positive
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    is_sharded,
    is_usable,
    join_parts,
    local_part,
)
from nmlightning.weights.history import Alignment, Moment, NormHistory, RecordPlace

STEP, DECAY, NORM = range(3)
"""What a rule acts on, in the order in which rules on one weight are attached."""
_KINDS = ("the step", "the decay", "the norm")
Granularity = Literal["auto", "matrix", "weight"]
GRANULARITIES = get_args(Granularity)
State = dict[str, Any]
"""What a rule keeps of a weight: (C,) tensors of this rank's channels, scalars and numbers."""

# With the weight scaled by c its gradients are scaled by 1/c. Averages of steps that the
# gradient's size was divided out of do not change.
_DEGREES = {
    "momentum_buffer": -1,
    "exp_avg": -1,
    "exp_avg_sq": -2,
    "max_exp_avg_sq": -2,
    "exp_inf": -1,
    "square_avg": -2,
    "grad_avg": -1,
    "sum": -2,
    "acc_delta": 0,
    "prev": -1,
    "step_size": 0,
    "ax": 1,
}


def find_keeper(optimizer: Optimizer) -> Optimizer:
    """Return what keeps the state: ZeroRedundancyOptimizer has another for each rank's weights."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def scaling_degree(optimizer: Optimizer, name: str) -> int:
    """Return d for a buffer of the optimizer's state that a weight scaled by c scales by c**d."""
    if isinstance(optimizer, RMSprop) and name == "momentum_buffer":
        return 0  # it adds up gradients that were divided by their size
    return _DEGREES.get(name, 0)


@dataclass(frozen=True, eq=False)
class OptimizedWeight:
    """One weight, and the optimizer that updates it.

    Of a sharded weight, everything here is about the channels that this rank holds. It is
    `of_layer` if it is known to be the weight of a convolution or of a linear layer.
    """

    name: str
    parameter: Tensor
    optimizer: Optimizer
    group_number: int
    layout: ChannelLayout = ROWS
    of_layer: bool = False

    @property
    def group(self) -> dict[str, Any]:
        """The optimizer's options for it; `load_state_dict` replaces them by others."""
        group: dict[str, Any] = self.optimizer.param_groups[self.group_number]
        return group

    @property
    def values(self) -> Tensor:
        """The weight itself, which may be changed in place."""
        return local_part(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, of the weight's shape; dense also where that of an embedding is not."""
        return None if self.parameter.grad is None else local_part(self.parameter.grad).to_dense()

    @property
    def state(self) -> Mapping[str, Any]:
        """What the optimizer keeps for it, on this rank."""
        state: Mapping[str, Any] = find_keeper(self.optimizer).state.get(self.parameter, {})
        return state

    @property
    def rules(self) -> dict[int, str]:
        """The names of the rules that steer it, by what they act on; a note on the optimizer."""
        notes = self.optimizer.__dict__.setdefault("_nmlightning_steered", {})
        rules: dict[int, str] = notes.setdefault(self.parameter, {})
        return rules

    def buffer(self, name: str) -> Tensor | None:
        """Return what the optimizer keeps for the weight under a name, such as `exp_avg`."""
        kept = self.state.get(name)
        return local_part(kept) if isinstance(kept, Tensor) else None

    @property
    def learning_rate(self) -> float:
        """η of the next or of the last step; InputError for an optimizer that has none."""
        if "lr" not in self.group:
            name = type(self.optimizer).__name__
            raise InputError(
                f'{name} has no "lr" in its parameter groups, which this rule follows.'
            )
        return float(self.group["lr"])

    @property
    def channels(self) -> int:
        """C, over all ranks."""
        return self.layout.channels(self.parameter.shape)

    @property
    def norms_dtype(self) -> torch.dtype:
        """The dtype that norms accumulate in."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def norms(self, values: Tensor | None = None) -> Tensor:
        """Return ‖w_i‖₂, (C,), of the weight or of `values` of its shape."""
        return channel_norms(self.values if values is None else values, layout=self.layout)

    def is_stack(self, granularity: Granularity) -> bool:
        """Return whether it is (E, out, in), a stack of matrices; InputError where that is open."""
        if self.parameter.dim() != 3 or self.of_layer or len(self.parameter) == 1:
            return False
        if granularity == "auto" and "expert" not in self.name.lower():
            raise InputError(
                f"{self.name} of shape {tuple(self.parameter.shape)} may be one weight or a stack "
                'of matrices: give granularity="weight" or "matrix", or name it in exclude.'
            )
        return granularity != "weight"

    def all_channels(self, values: Tensor) -> Tensor:
        """Return the (C, …) values of all ranks' channels, given those of this rank's."""
        if not is_sharded(self.parameter):
            return values
        from torch.distributed.tensor import DTensor

        mesh, placements = self.parameter.device_mesh, self.parameter.placements  # type: ignore[attr-defined]
        shape = torch.Size([self.channels, *values.shape[1:]])
        stride = values.stride()
        return DTensor.from_local(
            values, mesh, placements, shape=shape, stride=stride
        ).full_tensor()

    def local_channels(self, values: Tensor) -> Tensor:
        """Return this rank's part of the (C, …) values of all channels, on its device."""
        values = values.to(self.values.device)
        if not is_sharded(self.parameter):
            return values
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = self.parameter.device_mesh, self.parameter.placements  # type: ignore[attr-defined]
        return local_part(distribute_tensor(values, mesh, placements))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of what the ranks computed of their channels; every rank calls it."""
        return join_parts([values], [self.parameter])[0]

    def whole_norm(self, values: Tensor) -> Tensor:
        """Return ‖·‖₂ of values of the weight's shape, over the channels of all ranks."""
        norm: Tensor = torch.linalg.vector_norm(self.all_channels(self.norms(values)))
        return norm

    def spread(self, values: Tensor) -> Tensor:
        """Return (C,) values in a shape that scales the weight's channels, in the norms' dtype."""
        return self.layout.spread(values, self.values).to(self.norms_dtype)

    @torch.no_grad()
    def scale(self, factors: Tensor, least: Tensor | None = None) -> None:
        """Multiply channel i by factor i, and the optimizer's averages as its gradients change.

        The averages as if no factor was below `least`, if that is given.
        """
        self.values.mul_(self.spread(factors))
        factors = factors if least is None else torch.maximum(factors, least)
        optimizer = find_keeper(self.optimizer)
        for name in self.state:
            buffer, degree = self.buffer(name), scaling_degree(optimizer, name)
            if buffer is not None and degree:
                scales = factors**degree
                by_channel = buffer.shape[:1] == self.values.shape[:1]  # NovoGrad has one number
                buffer.mul_(self.layout.spread(scales, buffer) if by_channel else scales.mean())

    @torch.no_grad()
    def reset_nonfinite_state(self, skipped: Tensor) -> None:
        """Set to 0 what is not finite in the optimizer's averages of skipped channels, (C,) bool.

        Otherwise no later step would be finite. Each entry of the averages is kept or lost in all
        of them alike, since they belong together.
        """
        if not maybe_any(skipped):
            return
        averages = [
            local_part(kept)
            for kept in self.state.values()
            if isinstance(kept, Tensor) and kept.shape == self.parameter.shape
        ]
        lost = self.layout.spread(skipped, self.values)
        if averages:
            lost = lost & reduce(torch.logical_or, (~average.isfinite() for average in averages))
        for average in averages:
            average.masked_fill_(lost, 0.0)


def claim_weights(weights: Sequence[OptimizedWeight], rule: str, kind: int) -> None:
    """Note that a rule steers them, or raise InputError where another does that must come later."""
    for weight in weights:
        other = max(weight.rules, default=-1)
        if other >= kind:
            way_out = f"exclude the weight from it or from {rule}"
            if other > kind:
                acts, before = _KINDS[other], _KINDS[kind]
                way_out = f"attach it after {rule}, for it acts on {acts}, and that on {before}"
            raise InputError(
                f"{weight.name} is steered by {weight.rules[other]} already: remove that, or "
                f"{way_out}."
            )
    for weight in weights:
        weight.rules[kind] = rule


def maybe_any(flags: Tensor) -> bool:
    """Return whether any flag is set; True on devices that it would cost more to wait for."""
    return not flags.is_cpu or bool(flags.any())


@torch.no_grad()
def scale_step(
    weight: OptimizedWeight, before: Tensor, factors: Tensor, max_rotation: float | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the step Δw_i that led from `before` to the weight into f_i · Δw_i, in place.

    A channel whose step, factor or scaled weight is not finite, in float32 or in the dtype of the
    weight, goes back to where it was; one that did not move may have any factor. With a
    `max_rotation` f_i is lowered until ‖f_i Δw_i‖ ≤ max_rotation · ‖w_i‖, in radians for small
    angles.

    Returns:
        (C,) bool, the channels whose step was skipped; and (C,) the factors as they were applied,
        with the bound, 0 where the step was skipped.
    """
    after, dtype = weight.values, weight.norms_dtype
    lengths = channel_norms(after - before, layout=weight.layout)
    norms = channel_norms(before, layout=weight.layout)
    moved = lengths > 0
    reached = factors.isfinite() | ~moved
    if max_rotation is not None:
        factors = torch.minimum(factors, max_rotation * norms / lengths)
    factors = factors.where(moved, 0.0)
    skipped = ~(reached & (norms + factors * lengths < torch.finfo(after.dtype).max))
    factors = factors.where(~skipped, 0.0)
    scaled = torch.lerp(before.to(dtype), after.to(dtype), weight.spread(factors)).to(after.dtype)
    after.copy_(scaled.where(weight.spread(skipped) == 0, before) if maybe_any(skipped) else scaled)
    return skipped, factors


def take_step(
    weight: OptimizedWeight, before: Tensor, *, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Undo the step, as `scale_step`, where it is not finite: by channels, or as a `whole`."""
    factors = torch.ones_like(weight.norms())
    if whole:
        finite = weight.whole_norm(weight.values - before).isfinite()
        factors = factors.where(finite, torch.nan)
    return scale_step(weight, before, factors)


MAX_GROWTH = 1.02


@torch.no_grad()
def project(weight: OptimizedWeight, norms: Tensor, before: Tensor | None = None) -> Tensor:
    """Scale each channel to the norm (C,) that is asked of it, and the averages inversely.

    A channel does not change if that or its own norm is zero or not finite, or if the weight's
    dtype does not reach that far. Returned is what each was multiplied by, (C,).

    A momentum that points along its weight lengthens it, and would so be multiplied by more than it
    decays by, without end. The remedy of rules that bound a step's rotation are the norms `before`
    it, (C,): the averages are multiplied as if it had lengthened a channel by no more than
    MAX_GROWTH, which a step of 0.2 rad across it does.
    """
    factors = norms / weight.norms()
    reached = factors.isfinite() & (factors > 0) & (norms < torch.finfo(weight.values.dtype).max)
    factors = factors.where(reached, 1.0)
    least = None
    if before is not None:
        least = (norms / (MAX_GROWTH * before)).where(reached & (before > 0), 0.0)
    weight.scale(factors, least)
    return factors


def gather_state(weight: OptimizedWeight, state: State) -> State:
    """Return a copy of the state, of all ranks' channels."""
    gathered = dict(state)
    for key, value in state.items():
        if isinstance(value, Tensor):
            gathered[key] = (weight.all_channels(value) if value.dim() else value).clone()
    return gathered


def scatter_state(weight: OptimizedWeight, kept: Mapping[str, Any], state: State) -> None:
    """Resume a state from what `gather_state` returned."""
    for key, value in kept.items():
        if not isinstance(value, Tensor):
            state[key] = value
        else:
            state[key].copy_(weight.local_channels(value) if value.dim() else value)


class RecordedNorms:
    """The norms of one recording, for the weights that follow it, found by `NormHistory.place`."""

    def __init__(
        self, history: NormHistory, weights: Sequence[OptimizedWeight], align: Alignment
    ) -> None:
        self._align: Alignment = align
        self._clock = history.clock
        # Of a normalised weight, those of the unnormalised one behind it.
        names = {
            w.name: f"{w.name}_v" if f"{w.name}_v" in history.norms else w.name for w in weights
        }
        _check_weights(history, {names[w.name]: w for w in weights})
        if not len(history):
            raise InputError("The recording is empty.")
        self._norms = {name: history.norms[recorded] for name, recorded in names.items()}
        self._dead: dict[str, int] = {}
        self._latest: dict[str, tuple[RecordPlace, Tensor]] = {}

    def place(self, moment: Moment) -> RecordPlace:
        """Return the records around a moment, as `NormHistory.place`."""
        step, epoch = moment.get("step"), moment.get("epoch")
        return self._clock.place(None if step is None else int(step), epoch, self._align)

    def norms(self, weight: OptimizedWeight, place: RecordPlace) -> Tensor:
        """Return the (C,) norms of this rank's channels there, in the dtype of its norms."""
        known = self._latest.get(weight.name)
        if known is None or known[0] != place:
            below, above, share = place
            records = torch.from_numpy(self._norms[weight.name][[below, above]])
            first, second = records.to(weight.norms_dtype)
            norms = torch.lerp(first, second, share)
            dead = int((~is_usable(norms)).sum())
            if dead > self._dead.get(weight.name, 0):
                warnings.warn(
                    f"{dead} of {len(norms)} channels of {weight.name} have a recorded norm that "
                    "is zero or not finite; they are not steered.",
                    stacklevel=2,
                )
            self._dead[weight.name] = dead
            known = self._latest[weight.name] = place, weight.local_channels(norms)
        return known[1]


def _check_weights(history: NormHistory, weights: Mapping[str, OptimizedWeight]) -> None:
    try:
        history.check_weights({name: w.channels for name, w in weights.items()})
    except InputError as error:
        for name, weight in weights.items():
            shape, norms = weight.parameter.shape, history.norms.get(name)
            if weight.layout != ROWS or norms is None or len(shape) < 3:
                continue
            channels = norms.shape[1]
            if channels != shape[0] and channels % shape[1] == 0:  # of so many groups
                raise InputError(
                    f"{error} If it is a transposed convolution, give attach the model itself, "
                    "which knows its channels."
                ) from error
        raise


def check_reference(reference: object, align: str, max_rotation: float | None) -> None:
    """Raise InputError for what are no settings of a rule that follows a recording."""
    check_choice("align", align, get_args(Alignment))
    check_positive(max_rotation=max_rotation)
    if not isinstance(reference, NormHistory | str | Path):
        raise InputError(f"reference is a NormHistory or a path, got {reference!r}.")

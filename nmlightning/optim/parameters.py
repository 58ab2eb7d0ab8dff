"""Parameters of an optimizer as a rule sees them: names, channels, state and step operations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms
from nmlightning.weights.layer_weights import find_layer_weights, plain_name
from nmlightning.weights.shards import is_sharded, local_part

# By c to this power it is larger where the weight is c times as long, whose gradients are 1/c as
# large. Averages of steps that the gradient's size was divided out of stay as they are.
_POWERS = {
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


def buffer_power(optimizer: Optimizer, name: str) -> int:
    """Return the power of the weight's scale that a buffer goes with; 0 for one not known.

    Args:
        optimizer: whose buffer it is.
        name: in its state, such as `exp_avg`.
    """
    if isinstance(optimizer, RMSprop) and name == "momentum_buffer":
        return 0  # it adds up gradients that were divided by their size
    return _POWERS.get(name, 0)


@dataclass(frozen=True, eq=False)
class SteeredWeight:
    """One weight, and the optimizer that moves it.

    Of a sharded weight, everything here is about the channels that this rank holds.
    """

    name: str
    parameter: Tensor
    optimizer: Optimizer
    group_number: int
    layout: ChannelLayout = ROWS

    @property
    def group(self) -> Mapping[str, Any]:
        """The optimizer's options for it; `load_state_dict` replaces them by others."""
        group: Mapping[str, Any] = self.optimizer.param_groups[self.group_number]
        return group

    @property
    def values(self) -> Tensor:
        """The weight itself, which may be changed in place."""
        return local_part(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, of the weight's shape; dense also where that of an embedding is not."""
        return None if self.parameter.grad is None else local_part(self.parameter.grad).to_dense()

    def buffer(self, name: str) -> Tensor | None:
        """Return what the optimizer keeps for the weight under a name, such as `exp_avg`."""
        kept = self.optimizer.state.get(self.parameter, {}).get(name)
        return local_part(kept) if isinstance(kept, Tensor) else None

    @property
    def learning_rate(self) -> float:
        """η of the next or of the last step."""
        return float(self.group["lr"])

    @property
    def channels(self) -> int:
        """C, over all ranks."""
        return self.layout.channels(self.parameter.shape)

    @property
    def norms_dtype(self) -> torch.dtype:
        """The dtype that norms accumulate in."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def norms(self) -> Tensor:
        """Return ‖w_i‖₂, (C,)."""
        return channel_norms(self.values, layout=self.layout)

    def all_channels(self, values: Tensor) -> Tensor:
        """Return the (C,) values of all ranks' channels, given those of this rank's."""
        if not is_sharded(self.parameter):
            return values
        from torch.distributed.tensor import DTensor

        mesh, placements = self.parameter.device_mesh, self.parameter.placements  # type: ignore[attr-defined]
        shape = torch.Size([self.channels])
        return DTensor.from_local(values, mesh, placements, shape=shape, stride=(1,)).full_tensor()

    def local_channels(self, values: Tensor) -> Tensor:
        """Return this rank's part of the (C,) values of all channels, on its device."""
        values = values.to(self.values.device)
        if not is_sharded(self.parameter):
            return values
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = self.parameter.device_mesh, self.parameter.placements  # type: ignore[attr-defined]
        return local_part(distribute_tensor(values, mesh, placements))

    def spread(self, values: Tensor) -> Tensor:
        """Return (C,) values in a shape that scales the weight's channels, in the norms' dtype."""
        return self.layout.spread(values, self.values).to(self.norms_dtype)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply channel i by factor i, and the optimizer's averages as its gradients change."""
        self.values.mul_(self.spread(factors))
        for name in self.optimizer.state.get(self.parameter, {}):
            buffer, power = self.buffer(name), buffer_power(self.optimizer, name)
            if buffer is not None and power:
                buffer.mul_(self.layout.spread(factors**power, buffer))

    @torch.no_grad()
    def forget(self, undone: Tensor) -> None:
        """Set to 0 what is not finite in the optimizer's averages of channels that were undone.

        Otherwise no later step would be finite. Each entry of the averages is kept or lost in all
        of them alike, since they belong together.

        Args:
            undone: (C,) bool.
        """
        if not may_hold(undone):
            return
        state = self.optimizer.state.get(self.parameter, {}).values()
        averages = [
            local_part(kept)
            for kept in state
            if isinstance(kept, Tensor) and kept.shape == self.parameter.shape
        ]
        lost = self.layout.spread(undone, self.values)
        if averages:
            lost = lost & reduce(torch.logical_or, (~average.isfinite() for average in averages))
        for average in averages:
            average.masked_fill_(lost, 0.0)


def may_hold(flags: Tensor) -> bool:
    """Return whether any of the flags may be set: on the CPU it is looked up.

    Another device would have to be waited for, which costs more than what it would spare.
    """
    return not flags.is_cpu or bool(flags.any())


Model = nn.Module | Iterable[tuple[str, Tensor]]
"""A model, or its `named_parameters()`, which tell no more than names and shapes."""


@dataclass(frozen=True)
class NamedWeights:
    """The parameters of a model.

    Attributes:
        parameters: by plain name.
        layouts: where the output channels are, of the weights of which it is known.
        layers: the names of the weights of convolutions and linear layers; None where only shapes
            tell what is one.
    """

    parameters: Mapping[str, Tensor]
    layouts: Mapping[str, ChannelLayout]
    layers: frozenset[str] | None = None

    @classmethod
    def of(cls, model: Model, layouts: Mapping[str, ChannelLayout] | None = None) -> "NamedWeights":
        """Return those of a model; `layouts` are those of names alone."""
        if not isinstance(model, nn.Module):
            return cls(_plain_names(model), layouts or {})
        weights = find_layer_weights(model)
        names = {id(weight.parameter): weight.name for weight in weights}
        parameters = {
            names.get(id(parameter), plain_name(name)): parameter
            for name, parameter in model.named_parameters()
        }
        known = {weight.name: weight.layout for weight in weights} | dict(layouts or {})
        return cls(parameters, known, frozenset(weight.name for weight in weights))

    def layout(self, name: str) -> ChannelLayout:
        """Return where the output channels of a weight are: along dimension 0 if unknown."""
        return self.layouts.get(name, ROWS)

    def is_convolution(self, name: str) -> bool:
        """Return whether it is a convolution's weight: of three or more dimensions, in a layer."""
        convolves = self.layers is None or name in self.layers
        return convolves and self.parameters[name].dim() >= 3


def _plain_names(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    pairs = list(named_parameters) if isinstance(named_parameters, Iterable) else [named_parameters]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(
                f"attach takes the model or its named_parameters(), got {type(pair).__name__}."
            )
    return {plain_name(name): parameter for name, parameter in pairs}


@torch.no_grad()
def scale_step(
    weight: SteeredWeight, before: Tensor, factors: Tensor, max_rotation: float | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the step Δw_i that led from `before` to the weight into f_i · Δw_i.

    A channel whose step, factor or scaled weight is not finite, in float32 or in the dtype of the
    weight, goes back to where it was; one that did not move may have any factor.

    Args:
        weight: the weight after the optimizer's step; it is changed in place.
        before: its values before.
        factors: (C,) f_i.
        max_rotation: f_i is lowered until ‖f_i Δw_i‖ ≤ max_rotation · ‖w_i‖, in radians for small
            angles; None for no bound.

    Returns:
        (C,) bool, the channels whose step was undone; and (C,) the factors as they were applied,
        with the bound, 0 where the step was undone.
    """
    after, dtype = weight.values, weight.norms_dtype
    lengths = channel_norms(after - before, layout=weight.layout)
    norms = channel_norms(before, layout=weight.layout)
    moved = lengths > 0
    reached = factors.isfinite() | ~moved
    if max_rotation is not None:
        factors = torch.minimum(factors, max_rotation * norms / lengths)
    factors = factors.where(moved, 0.0)
    undone = ~(reached & (norms + factors * lengths < torch.finfo(after.dtype).max))
    factors = factors.where(~undone, 0.0)
    scaled = torch.lerp(before.to(dtype), after.to(dtype), weight.spread(factors)).to(after.dtype)
    after.copy_(scaled.where(weight.spread(undone) == 0, before) if may_hold(undone) else scaled)
    return undone, factors


@torch.no_grad()
def project(weight: SteeredWeight, norms: Tensor) -> Tensor:
    """Scale each channel to the norm that is asked of it, and the optimizer's averages inversely.

    Args:
        weight: it is changed in place.
        norms: (C,) ‖w_i‖₂ to have. A channel stays as it is where that or its own norm is zero or
            not finite, or where the weight's dtype does not reach that far.

    Returns:
        (C,) what each channel was multiplied by.
    """
    factors = norms / weight.norms()
    reached = factors.isfinite() & (factors > 0) & (norms < torch.finfo(weight.values.dtype).max)
    factors = factors.where(reached, 1.0)
    weight.scale(factors)
    return factors

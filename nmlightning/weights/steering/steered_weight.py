"""The weights that a rule steers: where they are in an optimizer, and their channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms
from nmlightning.weights.shards import is_sharded, local_part
from nmlightning.weights.steering.buffer_powers import buffer_power


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

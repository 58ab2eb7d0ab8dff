"""What a rule does to a step that the optimizer has taken: scale it, bound it, or undo it."""

import torch
from torch import Tensor

from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.steering.steered_weight import SteeredWeight, may_hold


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

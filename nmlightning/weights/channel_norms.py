"""Norms of weights per output channel and their summaries, of whole weights and of shards."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError


@dataclass(frozen=True)
class ChannelLayout:
    """The place of the output channels in a weight.

    Args:
        transposed_groups: None for a convolution or a linear layer, (C, …); the number of groups
            for a transposed convolution, whose weight is (C_in, C / groups, …).
    """

    transposed_groups: int | None = None

    def channels(self, shape: Sequence[int]) -> int:
        """Return C of a weight of this shape."""
        groups = self.transposed_groups
        return int(shape[0] if groups is None else shape[1] * groups)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weight as (C, …), one entry of dimension 0 for each output channel."""
        if self.transposed_groups is None:
            return weight
        groups = self.transposed_groups
        by_group = weight.reshape(groups, -1, *weight.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1)

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight of this shape whose `rows` are given."""
        if self.transposed_groups is None:
            return rows
        by_group = rows.view(self.transposed_groups, -1, *rows.shape[1:])
        return by_group.transpose(1, 2).contiguous().view(shape)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return the (C,) values in a shape that broadcasts against `weight`."""
        if self.transposed_groups is None:
            return values.view(-1, *[1] * (weight.dim() - 1))
        by_group = values.view(self.transposed_groups, 1, -1)
        by_input = by_group.expand(-1, weight.shape[0] // self.transposed_groups, -1)
        return by_input.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


ROWS = ChannelLayout()


def channel_norms(weight: Tensor, p: float = 2.0, layout: ChannelLayout = ROWS) -> Tensor:
    """Return ‖w_i‖_p of every output channel i.

        ‖w_i‖_p = (Σ |w_ij|^p)^(1/p),        ‖w_i‖_∞ = max |w_ij|

    Args:
        weight: (C, …), or as `layout` says. A `DTensor` may be sharded along dimension 0 or
            replicated; the norms are then a `DTensor` of the same placement.
        p: 1 or more, or `math.inf`.
        layout: where the output channels are.

    Returns:
        (C,), accumulated and returned in float32, in float64 for a float64 weight; not part of
        the autograd graph.

    Raises:
        InputError: p below 1; a weight that is no floating-point matrix or higher; channels that
            are split over ranks.

    Examples:
        >>> channel_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([5., 2.])
    """
    if not p >= 1:
        raise InputError(f"p must be at least 1, got {p!r}.")
    if weight.dim() < 2 or not weight.is_floating_point():
        raise InputError(
            f"expected a floating-point weight of two or more dimensions, got {weight.dtype} of "
            f"shape {tuple(weight.shape)}."
        )
    if is_sharded(weight):
        return _of_shards(weight, p, layout)
    return row_norms(layout.rows(weight.detach()), p)


def row_norms(rows: Tensor, p: float) -> Tensor:
    """Return ‖row‖_p of every entry of dimension 0, as part of the autograd graph.

    Of (C, …) rows it is (C,), accumulated and returned in float32, in float64 for float64. For
    p = 1 and ∞ torch's sums and maxima take a quarter of the time of its `vector_norm`.
    """
    dims, dtype = tuple(range(1, rows.dim())), torch.promote_types(rows.dtype, torch.float32)
    if p == 1:
        return rows.abs().sum(dims, dtype=dtype)
    if p == math.inf:
        return torch.maximum(rows.amax(dims), -rows.amin(dims)).to(dtype)
    norms: Tensor = torch.linalg.vector_norm(rows, p, dim=dims, dtype=dtype)
    return norms


def _of_shards(weight: Tensor, p: float, layout: ChannelLayout) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(weight, DTensor)
    split = [place for place in weight.placements if not place.is_replicate()]
    if any(place != Shard(0) for place in split) or (split and layout != ROWS):
        raise InputError(
            f"the output channels of a weight are split over ranks ({weight.placements}); shard "
            "it along its output channels."
        )
    local = channel_norms(weight.to_local(), p, layout)
    channels = torch.Size([weight.shape[0]]) if layout == ROWS else local.shape
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, shape=channels, stride=(1,)
    )


def gather_channels(values: Tensor) -> Tensor:
    """Return all ranks' (C,) values of a `DTensor`, as every rank has to ask; else the values."""
    return values.full_tensor() if is_sharded(values) else values  # type: ignore[attr-defined]


def effective_learning_rates(
    norms: Tensor,
    learning_rate: float | Tensor,
    *,
    power: int | Tensor = 2,
    momentum: float | Tensor = 0.0,
) -> Tensor:
    """Return η / ((1 − m) ‖w_i‖^power), (C,): how fast the direction of a channel learns.

    The norms are ‖w_i‖₂, (C,), of weights that the loss does not feel the norm of; the power is 2
    for SGD, and 1 for optimizers of the Adam kind, whose average does not add up, so that m is 0.

    Source: Hoffer et al. 2018, §3 (arXiv 1803.01814).
    """
    return learning_rate / ((1.0 - momentum) * norms**power)


def rotations(before: Tensor, after: Tensor, lengths: Tensor) -> Tensor:
    """Return the angle in radians between each channel's weight before and after a step, (C,).

        2 arcsin(√((‖Δw_i‖² − (‖w'_i‖ − ‖w_i‖)²) / (4 ‖w_i‖ ‖w'_i‖)))

    of the norms of the weight before, of the weight after and of the step, (C,) each. It is good to
    the rounding of the norms for small angles, too, where the arc cosine of ⟨w, w'⟩ in float32 is
    lost below 3e-4. NaN where a weight is zero.
    """
    product = before * after
    chord = (lengths.square() - (after - before).square()).clamp(min=0.0) / (4.0 * product)
    return 2.0 * torch.asin(chord.clamp(max=1.0).sqrt()).where(product > 0, math.nan)


def unit_rows(weight: Tensor, layout: ChannelLayout = ROWS) -> Tensor:
    """Return w_i / ‖w_i‖₂ as (C, …), in the dtype of the norms; NaN where a channel is zero."""
    norms = channel_norms(weight, layout=layout)
    rows = layout.rows(weight.detach()).to(norms.dtype)
    return rows / ROWS.spread(norms, rows)


_LEAST_CORRELATION = 1e-6  # a sum of ρ₁ β₂^k is right to less than 1e-3 from there on


def equilibrium_rotation(
    learning_rate: float,
    weight_decay: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    beta1: float | None = None,
    signed_beta2: float | None = None,
) -> float:
    """Return the rotation per step, in radians, at which weight decay and learning balance.

        SGD:   √(2ηλ / (1 + m))
        AdamW: √(2ηλ (1 − β₁) / (1 + β₁))
        Lion:  √(2ηλ / (1 + 4/π Σ_k asin ρ_k)),    ρ_k the autocorrelation at lag k = 1, 2, …

    It is the root mean square over steps, of a scale-invariant weight whose gradients are
    uncorrelated over time. An optimizer that averages gradients has a `beta1`, and λ beside the
    step; Lion, which steps by the sign of (1 − β₁) g + β₁ (its average with β₂), also a
    `signed_beta2`. Nesterov's momentum takes the same way in less even steps: its rotation is
    √((1 + m)² (1 − m²) + m⁴) times that of SGD.

    Source: Wan et al. 2021 (arXiv 2006.08419); Kosson et al. 2023 (arXiv 2305.17212). Nesterov's
    factor: its step is (1 + m) g_t + m² g_(t−1) + m³ g_(t−2) + …, the other g_t + m g_(t−1) + ….
    Lion's: Gaussians that correlate by ρ have signs that correlate by 2/π asin ρ. All are within
    2 % of what benchmarks/equilibrium.py simulates.
    """
    if beta1 is None:
        share = 1 / (1 + momentum)
    elif signed_beta2 is None:
        share = (1 - beta1) / (1 + beta1)
    else:
        correlations = map(math.asin, _sign_input_correlation(beta1, signed_beta2))
        share = 1 / (1 + 4 / math.pi * sum(correlations))
    if nesterov:
        share *= (1 + momentum) ** 2 * (1 - momentum**2) + momentum**4
    return math.sqrt(2 * learning_rate * weight_decay * share)


def _sign_input_correlation(beta1: float, beta2: float) -> Iterator[float]:
    """Yield ρ_1, ρ_2, … of (1 − β₁) g_t + β₁ (1 − β₂) Σ_j β₂^(j−1) g_(t−j), for g uncorrelated."""
    new, old = 1 - beta1, beta1**2 * (1 - beta2) / (1 + beta2)
    rho = (new * beta1 * (1 - beta2) + old * beta2) / (new**2 + old)
    while rho > _LEAST_CORRELATION:
        yield rho
        rho *= beta2


def is_usable(norms: Tensor) -> Tensor:
    """Return bool of the same shape: where a recorded norm is positive and finite."""
    return (norms > 0) & norms.isfinite()


STATISTICS = ("min", "mean", "max", "median")


def summarise_channels(values: Sequence[Tensor]) -> Tensor:
    """Return (L, 4) the smallest, mean, largest and median of (C_l,) values of each of L layers.

    Where a layer has a NaN, all but its median, which leaves it out, are NaN. The median of an even
    number is the lower one.
    """
    return reduce_channels(
        values,
        lambda x: torch.stack([x.amin(1), x.mean(1), x.amax(1), x.nanmedian(1).values], dim=1),
    )


def reduce_channels(values: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (L, …) of (C_l,) values: what `reduce` makes of (N, C), of N layers of one width."""
    places, found = dict[int, list[int]](), dict[int, Tensor]()
    for number, each in enumerate(values):
        places.setdefault(each.numel(), []).append(number)
    for numbers in places.values():
        rows = torch.stack([values[number] for number in numbers])
        found |= zip(numbers, reduce(rows).unbind(), strict=True)
    return torch.stack([found[number] for number in range(len(values))])


def is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, without importing what makes them."""
    return type(tensor).__name__ == "DTensor"


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Return whether they are of no class but torch's own, as kernels take them."""
    return {type(tensor) for tensor in tensors} <= {Tensor, nn.Parameter}


def is_flat(tensor: Tensor) -> bool:
    """Return whether FSDP1 put several parameters, flattened, into it."""
    return bool(getattr(tensor, "_is_flat_param", False))


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of it, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def join_parts(
    parts: Sequence[Tensor], parameters: Sequence[Tensor], operation: Literal["sum", "max"] = "sum"
) -> list[Tensor]:
    """Return what each rank has of some parameters, joined over the ranks that hold parts of them.

    The parts of a parameter have one shape on all ranks, each of which has to call it. All of a
    mesh take one collective; those of a parameter that each rank holds whole do not change.
    """
    joined, places = [*parts], dict[tuple[Any, Any], list[int]]()
    for number, parameter in enumerate(parameters):
        if is_sharded(parameter):
            place = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            places.setdefault(place, []).append(number)
    for (mesh, placements), numbers in places.items():
        flat = torch.cat([parts[n].flatten() for n in numbers])
        lengths = [parts[n].numel() for n in numbers]
        whole = torch.split(_join(flat, mesh, placements, operation), lengths)
        for number, values in zip(numbers, whole, strict=True):
            joined[number] = values.view(parts[number].shape)
    return joined


def _join(values: Tensor, mesh: Any, placements: Any, operation: str) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Replicate() if place.is_replicate() else Partial(operation) for place in placements]
    return DTensor.from_local(values, mesh, parts).full_tensor()


def local_ranges(tensor: Tensor, layout: ChannelLayout = ROWS) -> list[slice]:
    """Return what this rank holds of a weight's rows, (C, …), along each dimension.

    Raises:
        InputError: shards of a transposed convolution with groups.
    """
    ranges = [slice(0, length) for length in tensor.shape]
    if is_sharded(tensor):
        if layout.transposed_groups not in (None, 1):
            raise InputError(
                "a transposed convolution with groups is split over ranks: replicate its weight."
            )
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        # A strided shard is a part of what the other mesh dimension cuts first.
        order = sorted(enumerate(placements), key=lambda p: "Strided" in type(p[1]).__name__)
        for number, place in order:
            if not place.is_replicate():
                held = ranges[place.dim]
                size = -(-(held.stop - held.start) // mesh.size(number))
                begin = min(held.start + size * mesh.get_local_rank(number), held.stop)
                ranges[place.dim] = slice(begin, min(begin + size, held.stop))
    if layout.transposed_groups is not None:
        groups = layout.transposed_groups
        inputs = slice(0, len(tensor) // groups) if groups > 1 else ranges[0]
        outputs = slice(0, layout.channels(tensor.shape)) if groups > 1 else ranges[1]
        ranges = [outputs, inputs, *ranges[2:]]
    return ranges


Kernels = Callable[[str], Any]
"""Returns what has `row_norms` of many weights at once on a type of device, or None."""


def local_norms(
    tensors: Sequence[Tensor], layouts: Sequence[ChannelLayout], kernels: Kernels | None = None
) -> list[Tensor]:
    """Return the (C,) ‖w_i‖₂ of each weight, of the part that this rank holds.

    They accumulate in float32, in float64 for float64; kernels take all weights at once.
    """
    parts = [local_part(tensor.detach()) for tensor in tensors]
    rows = [layout.rows(part) for part, layout in zip(parts, layouts, strict=True)]
    ready = kernels(rows[0].device.type) if kernels and rows and are_plain(rows) else None
    together = ready.row_norms(rows, 2.0) if ready is not None else torch.empty(0)
    if len(together):
        return list(torch.split(together, [len(each) for each in rows]))
    return [row_norms(each, 2.0) for each in rows]


def step_norms(
    after: Sequence[Tensor],
    before: list[Tensor],
    layouts: Sequence[ChannelLayout],
    kernels: Kernels | None,
) -> list[Sequence[Tensor]]:
    """Return `local_norms` of weights after a step, of the parts `before` it, and of the steps.

    The steps may be written over those parts.
    """
    parts = [local_part(tensor.detach()) for tensor in after]
    rows = [list(map(ChannelLayout.rows, layouts, each)) for each in (parts, before)]
    fits = parts[0].is_cpu and are_plain([*rows[0], *rows[1]])
    ready = kernels("cpu") if kernels and fits else None
    together = ready.step_norms(*rows) if ready is not None else torch.empty(0)
    if len(together):
        return [torch.split(each, list(map(len, rows[0]))) for each in together]
    found = [local_norms(each, layouts, kernels) for each in (parts, before)]
    if any(each.dtype.itemsize < 4 for each in before):
        before = [b.float() - a.float() for b, a in zip(before, parts, strict=True)]
    else:
        torch._foreach_sub_(before, parts)
    return [*found, local_norms(before, layouts, kernels)]


def join_norms(
    norms: Sequence[Tensor], parameters: Sequence[Tensor], layouts: Sequence[ChannelLayout]
) -> list[Tensor]:
    """Return the (C,) norms of whole weights, given those of the parts that this rank holds.

    Of a weight that is sharded, along any dimensions, ranks add up Σ w_ij²; none gathers it.
    """
    if not any(map(is_sharded, parameters)):
        return [*norms]
    squares = []
    for part, parameter, layout in zip(norms, parameters, layouts, strict=True):
        whole = part
        if is_sharded(parameter):
            whole = part.new_zeros(layout.channels(parameter.shape))
            whole[local_ranges(parameter, layout)[0]] = part.square()
        squares.append(whole)
    joined = join_parts(squares, parameters)
    each = zip(joined, parameters, strict=True)
    return [whole.sqrt() if is_sharded(parameter) else whole for whole, parameter in each]

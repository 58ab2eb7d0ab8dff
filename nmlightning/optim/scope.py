"""Scope of a rule: weights chosen by name and shape, then by measured scale invariance.

A weight is scale-invariant if |⟨g, w⟩| ≤ tol·‖g‖‖w‖ on the first gradients g of its channels.
"""

import math
import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nmlightning.errors import InputError, lay_out, terminal_width
from nmlightning.name_patterns import by_reason, matches, plain_name, some, unmatched
from nmlightning.optim.families import group_numbers
from nmlightning.optim.parameters import OptimizedWeight
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms, is_flat
from nmlightning.weights.layer_weights import find_layer_weights

CONVOLUTIONS, MATRICES = 3, 2
"""The fewest dimensions of a weight that a rule works on where nothing is included by name."""
_DEFAULTS = {
    CONVOLUTIONS: ("convolutions", "not a convolution (add it by include)"),
    MATRICES: ("weights of two or more dimensions", "it has fewer than two dimensions"),
}


class Choice(NamedTuple):
    """Glob patterns on plain names, and the fewest dimensions of what is steered without any.

    `within` are the patterns to include and to exclude of a tracker, which limit it, too. Unless
    `decays`, the optimizer must not decay them. Of `sorted_by` the first that matches a name
    counts, and each has to be the first one for some.
    """

    include: Sequence[str]
    exclude: Sequence[str]
    least_dims: int = CONVOLUTIONS
    within: tuple[Sequence[str], Sequence[str]] = ((), ())
    decays: bool = False
    sorted_by: Sequence[str] = ()


Model = nn.Module | Iterable[tuple[str, Tensor]]
"""A model, or its `named_parameters()`, of which names and shapes alone are known."""


@dataclass(frozen=True)
class NamedWeights:
    """The parameters of a model by plain name, and where their output channels are, if not along 0.

    `layers` are the names of the weights of convolutions and linear layers; None where names and
    shapes alone are known.
    """

    parameters: Mapping[str, Tensor]
    layouts: Mapping[str, ChannelLayout]
    layers: frozenset[str] | None = None

    @classmethod
    def of(cls, model: Model, layouts: Mapping[str, ChannelLayout] | None = None) -> "NamedWeights":
        """Return those of a model; `layouts` are those of names alone."""
        if not isinstance(model, nn.Module):
            pairs = list(model) if isinstance(model, Iterable) else [model]
            for pair in pairs:
                if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                    raise InputError(
                        "attach takes the model or its named_parameters(), got "
                        f"{type(pair).__name__}."
                    )
            return cls({plain_name(name): q for name, q in pairs}, layouts or {})
        try:
            weights = find_layer_weights(model)
        except InputError:  # it has none, as an LSTM, whose matrices are yet parameters
            if any(map(is_lazy, model.parameters())):
                raise
            weights = []
        names = {id(weight.parameter): weight.name for weight in weights}
        parameters = {
            names.get(id(parameter), plain_name(name)): parameter
            for name, parameter in model.named_parameters()
        }
        known = {weight.name: weight.layout for weight in weights} | dict(layouts or {})
        return cls(parameters, known, frozenset(weight.name for weight in weights))


def choose_weights(
    optimizer: Optimizer,
    model: Model,
    choice: Choice,
    layouts: Mapping[str, ChannelLayout] | None = None,
    recorded: Container[str] | None = None,
) -> list[OptimizedWeight]:
    """Return the weights of `optimizer` to steer, under their plain names.

    `layouts` are as in `StepRule.attach`. A convolution is a layer's weight of three or more
    dimensions; where only names and shapes are known, every parameter of so many that is among the
    names `recorded`, if any is.
    """
    weights = NamedWeights.of(model, layouts)
    groups = group_numbers(optimizer)
    _check_names(weights, choice)
    names = [
        name
        for name in weights.parameters
        if unsteered_reason(weights, name, groups, choice) is None
    ]
    if recorded is not None and weights.layers is None and not choice.include:
        names = _leave_unrecorded(names, recorded)
    if not names:
        held = [name for name, q in weights.parameters.items() if q in groups]
        if not held:
            why = "it has copies of them, as in SafeFP16Optimizer, or is of another model"
            if not any(parameter.requires_grad for parameter in groups):
                why = "there is nothing that it trains"
            name = type(optimizer).__name__
            raise InputError(f"The {name} that steps has none of these parameters: {why}.")
        default = _DEFAULTS[choice.least_dims][0]
        if any(choice.within):
            default += " that the tracker's include and exclude choose"
        raise InputError(
            f"There is no weight to steer: by default these are the {default} in the optimizer; "
            f"name others by include. It has {some(held)}."
        )
    chosen = []
    for name in names:
        parameter, layout = weights.parameters[name], weights.layouts.get(name, ROWS)
        of_layer = name in (weights.layers or ())
        number = groups[parameter]
        chosen.append(OptimizedWeight(name, parameter, optimizer, number, layout, of_layer))
        _check_weight(chosen[-1], choice)
    return chosen


def has_weights(optimizer: Optimizer, model: Model, choice: Choice) -> bool:
    """Return whether `choose_weights` finds any weight to steer."""
    weights, groups = NamedWeights.of(model), group_numbers(optimizer)
    reasons = (unsteered_reason(weights, name, groups, choice) for name in weights.parameters)
    return None in reasons


def unsteered_reason(
    weights: NamedWeights, name: str, optimized: Container[Tensor], choice: Choice
) -> str | None:
    """Return in words why a parameter of the model is not to be steered, or None if it is."""
    parameter, (include, exclude, least_dims, within, *_) = weights.parameters[name], choice
    if not parameter.requires_grad:
        return "it is frozen at the start"
    if parameter not in optimized:
        return "no optimizer has it"
    if matches(name, exclude):
        return "exclude names it"
    if include and not matches(name, include):
        return "include does not name it"
    recorded = name.removesuffix("_v")  # as a tracker calls a normalised weight
    if matches(recorded, within[1]) or (within[0] and not matches(recorded, within[0])):
        return "the tracker's include and exclude leave it out"
    if include:
        is_passed_over = parameter.dim() < 2 and name not in include
        return "patterns skip weights of one dimension" if is_passed_over else None
    may_fit = least_dims == MATRICES or weights.layers is None or name in weights.layers
    return None if may_fit and parameter.dim() >= least_dims else _DEFAULTS[least_dims][1]


def exempt_from_decay(groups: Iterable[Any], model: nn.Module, rule: Any) -> list[dict[str, Any]]:
    """Return an optimizer's groups in which nothing decays that `rule` may steer.

    A group that decays is split in two of the same options, one of them with `weight_decay` 0.

    Args:
        groups: what an optimizer takes: parameters or dictionaries with `params`, such as those of
            timm's `param_groups_weight_decay`, with or without names.
        model: holds the parameters.
        rule: a `StepRule` to attach to the optimizer, or to give to a `WeightNormTracker`.

    Examples:
        >>> from nmlightning import Hyperball
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = exempt_from_decay(model.parameters(), model, Hyperball(exclude=["2.*"]))
        >>> [(len(group["params"]), group.get("weight_decay")) for group in groups]
        [(5, None), (1, 0.0)]
    """
    weights, owned, split = NamedWeights.of(model), set(model.parameters()), []
    reasons = {x: unsteered_reason(weights, x, owned, rule.choice) for x in weights.parameters}
    steered = {weights.parameters[name] for name, reason in reasons.items() if reason is None}
    given = list(groups)
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        if "param_names" in group:  # an optimizer that got names keeps them so
            params = list(zip(group["param_names"], params, strict=True))
        parts: tuple[list[Any], list[Any]] = ([], [])
        for item in params:
            is_steered = (item[1] if isinstance(item, tuple) else item) in steered
            parts[is_steered and group.get("weight_decay") != 0].append(item)
        split += [{**group, "params": parts[0]}]
        split += [{**group, "params": parts[1], "weight_decay": 0.0}]
    return [group for group in split if group["params"]]


def _check_names(weights: NamedWeights, choice: Choice) -> None:
    for name, parameter in weights.parameters.items():
        if is_flat(parameter):
            raise InputError(
                f"{name} is a flat shard of FSDP1, which has no channels: use FSDP2 "
                "(ModelParallelStrategy) or DDP."
            )
    wrong = unmatched((*choice.include, *choice.exclude), weights.parameters)
    if wrong is not None:
        raise InputError(
            f"The pattern {wrong!r} matches no parameter. There is {some(weights.parameters)}."
        )
    patterns = choice.sorted_by
    firsts = {next((p for p in patterns if matches(x, [p])), "") for x in weights.parameters}
    for wrong in [pattern for pattern in patterns if pattern not in firsts]:
        raise InputError(f"The pattern {wrong!r} matches no parameter that none before it does.")


def _leave_unrecorded(names: list[str], recorded: Container[str]) -> list[str]:
    """Return those of the names that are recorded, or all of them if none is."""
    left = [name for name in names if name not in recorded]
    if not left or len(left) == len(names):
        return names
    warnings.warn(
        f"The recording has no {some(left)}, by its shape a convolution, which is not steered: "
        "exclude it, or give attach the model itself.",
        stacklevel=4,
    )
    return [name for name in names if name in recorded]


def _check_weight(weight: OptimizedWeight, choice: Choice) -> None:
    decay = weight.group.get("weight_decay")
    if decay and not choice.decays:
        raise InputError(
            f"{weight.name} has weight decay {float(decay):g} in its optimizer. It is a part of "
            "the step, which the rule changes: give the optimizer the groups of "
            "`nmlightning.exempt_from_decay(groups, model, rule)`, or weight_decay 0; in a config "
            "`weight_decay: 0` of the optimizer, or a `weight_decay_scope` without the weight, as "
            "`no_conv` (docs: Train without weight decay)."
        )
    try:
        channel_norms(weight.parameter, layout=weight.layout)
    except InputError as error:
        raise InputError(f"{weight.name} cannot be steered: {error} Exclude it.") from error


def scope_text(rule: str, reasons: Mapping[str, str], stream: Any = None) -> str:
    """Return for a stream how many weights a rule steers, and below it the others by the reason."""
    left = {name: why for name, why in reasons.items() if why.startswith("not steered")}
    count = f"{rule} steers {len(reasons) - len(left)} of {len(reasons)} weights"
    alike = {name: re.sub(r"^not steered: | \(radial share .*\)", "", left[name]) for name in left}
    lines = [f"{count}; not steered:" if left else count, *by_reason(alike)]
    return lay_out("\n ".join(lines), terminal_width(stream))


TOLERANCE = 0.1
"""Of random directions in D dimensions the cosine is about 1/√D: a tenth of it passes for zero."""
CHANCE = 1e-5
"""The probability that gradients of random direction pass for zero."""


def radial_squares(weight: OptimizedWeight, values: Tensor, grad: Tensor) -> Tensor:
    """Return the sum over channels of (cos(w_i, g_i) · √D)², and how many channels it is over.

    The terms are 0 where the loss does not depend on ‖w_i‖, since then <g_i, w_i> = 0, and about 1
    for a gradient of random direction, at any scale. Channels without a gradient are left out.
    """
    dtype = weight.norms_dtype
    rows, grads = (weight.layout.rows(x).flatten(1).to(dtype) for x in (values, grad))
    norms, sizes = (channel_norms(x, layout=weight.layout) for x in (values, grad.to(dtype)))
    cosines = (rows * (grads / sizes[:, None])).sum(1) / norms
    used = (sizes > 0) & (norms > 0)
    squares = weight.all_channels(cosines.square().where(used, 0.0))
    count = weight.all_channels(used.to(dtype))
    return torch.stack([squares.sum() * rows.shape[1], count.sum()])


def share_limit(samples: int) -> float:
    """Return the largest radial share that passes for zero, given that many channels' gradients.

    Of n random directions n · share² is χ² distributed with n degrees of freedom, so that

        P(share ≤ s) ≤ (n s² / 2)^(n/2) / Γ(n/2 + 1),

    which is `CHANCE` at what is returned; from six samples on it is `TOLERANCE`.
    """
    half = samples / 2
    square = math.exp((math.log(CHANCE) + math.lgamma(half + 1)) / half) / half
    return min(TOLERANCE, math.sqrt(square))


class Scope:
    """The weights that are steered: those whose first gradients do not point along them.

    The radial share, the root mean square of cos(w_i, g_i) · √D over channels and steps, decides as
    soon as it can: for most weights at the first step, and for one of few channels after several
    where it is small, yet may be so by chance. Until then the weight is left.

    A scope that `insists` steers the others too, for they were named, with a warning, and one that
    `sorts` without; one that does not measure steers every weight.
    """

    def __init__(self, *, insists: bool, measures: bool = True, sorts: bool = False) -> None:
        self.insists = insists and not sorts
        self.sorts = sorts
        self.measures = measures
        self.shares: dict[str, float] = {}  # the radial share of each weight that has had gradients
        self.samples: dict[str, int] = {}  # how many channels' gradients it is of
        self._pending: dict[str, tuple[float, float]] = {}

    def measure(self, weight: OptimizedWeight, *, again: bool = True) -> None:
        """Measure the gradient of the next step at the weight as it is; the last call counts.

        Unless it is to be measured `again`, the first call counts. Measuring ends
        once it is decided.
        """
        if not again and weight.name in self._pending:
            return
        self._pending.pop(weight.name, None)
        if not self.decided(weight.name) and weight.gradient is not None:
            squares, count = radial_squares(weight, weight.values, weight.gradient).tolist()
            if count and math.isfinite(squares):
                self._pending[weight.name] = squares, count

    def take(self, weight: OptimizedWeight) -> None:
        """Count the gradient that was measured, for its step was taken."""
        squares, count = self._pending.pop(weight.name, (0.0, 0.0))
        if count:
            self._add(weight.name, squares, int(count))

    def forget(self) -> None:
        """Count none of the gradients that were measured, for their step was skipped."""
        self._pending.clear()

    def decided(self, name: str) -> bool:
        """Return whether it is known if the loss depends on the norm of a weight."""
        known = self.passes(name) or (name in self.shares and self._felt(name))
        return known or not self.measures

    def passes(self, name: str) -> bool:
        """Return whether the weight has proved to be scale-invariant."""
        return name in self.shares and self.shares[name] <= share_limit(self.samples[name])

    def holds(self, weight: OptimizedWeight) -> bool:
        """Return whether the weight is steered."""
        named = self.insists or self.sorts
        return named or weight.name not in self.shares or self.passes(weight.name)

    def reason(self, name: str) -> str:
        """Return in words what was decided about a weight."""
        if not self.measures:
            return "steered"
        if name not in self.shares:
            return "steered; no gradient yet"
        share = f"{self.shares[name]:.1e}"
        if self.passes(name):
            return f"steered: scale-invariant (radial share {share})"
        verdict = "steered" if self.sorts else "not steered"
        verdict = "steered by include" if self.insists else verdict
        if self._felt(name):
            return f"{verdict}: the loss depends on its norm (radial share {share})"
        share = f"radial share {share} in {self.samples[name]} channels' gradients"
        return f"{verdict}{' so far' * verdict.startswith('not')}: that may be chance ({share})"

    def _felt(self, name: str) -> bool:
        return self.shares[name] > TOLERANCE

    def _add(self, name: str, squares: float, count: int) -> None:
        before = self.samples.get(name, 0)
        total = self.shares.get(name, 0.0) ** 2 * before + squares
        self.samples[name] = before + count
        self.shares[name] = math.sqrt(total / self.samples[name])
        if self.insists and self._felt(name):
            warnings.warn(
                f"{name} is steered, but the loss depends on its norm (is there no norm layer "
                "after it?), which then does not set the learning rate alone; remove it from "
                "include.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"shares": dict(self.shares), "samples": dict(self.samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shares, self.samples = dict(state["shares"]), dict(state["samples"])

"""Measures weights and the optimizer steps that move them: norms, lengths, angles, gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.errors import check_choice, check_lists
from nmlightning.optim.families import expected_rotation, group_numbers, known_power
from nmlightning.optim.step_hooks import StepHookHandle
from nmlightning.reports import tags
from nmlightning.tracking.power_iteration import PowerIteration
from nmlightning.weights.channel_norms import (
    STATISTICS,
    are_plain,
    effective_learning_rates,
    join_norms,
    join_parts,
    local_norms,
    local_part,
    reduce_channels,
    rotations,
    step_norms,
    summarise_channels,
)
from nmlightning.weights.layer_weights import LayerWeight
from nmlightning.weights.recorder import Recorder

_OF_GRADIENTS = ("unclipped_gradient_norm", "gradient_norm")
_OF_STEPS = ("step_norm", "rotation", "update_ratio")
DEFAULT = ("weight_norm", "rotation", "effective_lr")
QUANTITIES = ("weight_norm", *tags.QUANTITIES)


def check_quantities(quantities: Sequence[str]) -> tuple[str, ...]:
    """Return them without repetition; InputError for what is none."""
    check_lists(quantities=quantities)
    for name in quantities:
        check_choice("a quantity", name, QUANTITIES)
    return tuple(dict.fromkeys(quantities))


class DeviceReading:
    """Collects numbers; `read` is where the device is waited for, once."""

    def __init__(self) -> None:
        self._tags: list[str] = []
        self._values: list[Tensor] = []

    def add(self, tags: Sequence[str], values: Tensor) -> None:
        """Note as many numbers, of any shape and dtype, as there are tags."""
        assert len(tags) == values.numel(), f"{len(tags)} tags for {values.numel()} values"
        self._tags.extend(tags)
        self._values.append(values.detach().flatten().float())

    def read(self) -> dict[str, float]:
        """Return all numbers by tag, from float32."""
        if not self._values:
            return {}
        device = max((v.device for v in self._values), key=lambda device: device.type != "cpu")
        numbers = torch.cat([values.to(device) for values in self._values]).tolist()
        return dict(zip(self._tags, numbers, strict=True))


def _root_mean_square(values: Sequence[float]) -> Any:
    return np.sqrt(np.mean(np.square(values)))


# What is logged over all layers: of minima the least, of maxima the largest, ….
_POOLS: Mapping[str, Callable[[Sequence[float]], Any]] = {
    tags.norm_tag("{layer}", "min"): np.min,
    tags.norm_tag("{layer}", "mean"): np.mean,
    tags.norm_tag("{layer}", "max"): np.max,
    tags.EFFECTIVE_LR + "{layer}": np.median,
    tags.ROTATION + "{layer}": _root_mean_square,
    tags.EQUILIBRIUM + "{layer}": _root_mean_square,
    **{f"{name}/{{layer}}": np.median for name in ("step_norm", "update_ratio", tags.COSINE)},
    **{f"{name}/{{layer}}": np.max for name in (*_OF_GRADIENTS, "spectral_norm")},
    tags.factor_tag("{layer}", "mean"): np.mean,
    tags.factor_tag("{layer}", "max"): np.max,
    **{tags.angle_tag("{layer}", tensor): np.max for tensor in tags.ROUNDED},
    tags.STEERING_SKIPPED: np.max,
    tags.SKIPPED_STEPS: np.max,
}


def pool_layers(values: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Return a handful of values over all layers, under the tags of a layer `all`."""
    pooled = {}
    for tag, pool in _POOLS.items():
        tags_of_layers = {tag.replace("{layer}", layer) for layer in layers}
        known = [values[each] for each in tags_of_layers if each in values]
        if known:
            pooled[tag.replace("{layer}", "all")] = float(pool(known))
    return pooled


@dataclass(frozen=True)
class _Step:
    """A weight that a step moves, and the rates of that step."""

    weight: LayerWeight
    learning_rate: float
    momentum: float
    power: int | None
    equilibrium: float | None


class StepMeter:
    """Measures a recorder's weights and their steps, on their device; `read` waits for it, once.

    With w_i an output channel before the step, Δw_i what the step did with momentum, decay and
    steering, and g_i the gradient, a layer of C channels has

        step_norm               √(Σ_i ‖Δw_i‖² / C)
        update_ratio            ‖Δw‖ / ‖w‖, of all channels together
        rotation                the root mean square of the angles from w_i to w_i + Δw_i
        gradient_norm           √(Σ_i ‖g_i‖² / C), as the optimizer finds it, without a
                                GradScaler's scale; unclipped_gradient_norm when `measure` is called
        weight_gradient_cosine  ⟨w, g⟩ / (‖w‖ ‖g‖), of all channels together
        effective_lr            η / ((1 − m) n^power), n the median ‖w_i + Δw_i‖, of an even number
                                the lower one
        spectral_norm           σ₁ of w + Δw as a matrix (C, …), by `PowerIteration`
        weight_norm             smallest, mean, largest and the same median ‖w_i + Δw_i‖

    All accumulate in float32, in float64 for float64. Of shards, along any dimension, ranks add up
    sums, and every rank has to call each method. A copy of the weights is kept for Δw.
    """

    def __init__(
        self,
        recorder: Recorder,
        quantities: Sequence[str] = DEFAULT,
        handles: Sequence[StepHookHandle] = (),
    ) -> None:
        self.recorder, self.handles = recorder, handles
        self._wanted = set(quantities)
        self.layers = {tags.layer_of(weight.name): weight for weight in recorder.weights}
        self._moved = {name: w for name, w in self.layers.items() if w.computed is None}
        self._before: dict[str, Tensor] = {}  # copies, of this rank's parts
        self._steps: dict[str, _Step] = {}
        self._gradients: dict[str, dict[str, Tensor]] = {name: {} for name in _OF_GRADIENTS}
        self._unclipped: dict[str, Tensor] = {}  # of steps that are still to begin
        self._products: dict[str, Tensor] = {}
        self._power_iteration = PowerIteration()
        self.norms: list[Tensor] | None = None  # as `finish` found them
        self._values: dict[str, tuple[list[str], Tensor]] = {}  # of some layers each

    @torch.no_grad()
    def begin(self, optimizer: Optimizer) -> None:
        """Keep the weights that this step of an optimizer will move."""
        numbers = group_numbers(optimizer)
        weights = {k: w for k, w in self._moved.items() if w.parameter in numbers}
        for layer, weight in weights.items():
            group = optimizer.param_groups[numbers[weight.parameter]]
            self._steps[layer] = _Step(
                weight,
                float(group["lr"]),
                float(group.get("momentum", 0.0)),
                known_power(optimizer),
                expected_rotation(optimizer, group),
            )
            if layer in self._unclipped:
                self._gradients[_OF_GRADIENTS[0]][layer] = self._unclipped.pop(layer)
        self.norms, self._values = None, {}
        if self._wanted & {*_OF_STEPS, tags.COSINE}:
            values = {k: local_part(w.parameter.detach()) for k, w in weights.items()}
            for layer, now in values.items():
                kept = self._before.get(layer)
                if kept is None or (kept.shape, kept.device) != (now.shape, now.device):
                    self._before[layer] = torch.empty_like(now)
            if values:
                copies, each = [self._before[k] for k in values], list(values.values())
                kernels, fits = self.recorder.kernels, each[0].is_cpu and are_plain(each)
                ready = kernels("cpu") if kernels and fits else None
                copy = torch._foreach_copy_ if ready is None else ready.copy_weights
                copy(copies, each)

    def measure(self, scale: float | Tensor = 1.0, optimizer: Optimizer | None = None) -> None:
        """Measure `unclipped_gradient_norm` on the gradients as they are now, before clipping.

        They are those of one optimizer, or all, and may still be multiplied by a `scale`, as by
        `scaler.get_scale()` before `scaler.unscale_(optimizer)`. The next step takes them that an
        optimizer of theirs begins.
        """
        if "unclipped_gradient_norm" in self._wanted:
            numbers = None if optimizer is None else group_numbers(optimizer)
            moved = self._moved.items()
            layers = [k for k, w in moved if numbers is None or w.parameter in numbers]
            for layer in layers:
                self._unclipped.pop(layer, None)
            self._unclipped |= self._gradient_norms(layers, scale)

    @torch.no_grad()
    def measure_step(self, optimizer: Optimizer) -> None:
        """Measure the gradients of a step that is about to be taken, as the optimizer finds them.

        A fused optimizer divides by the scale of a GradScaler itself.
        """
        if not self._wanted & {"gradient_norm", tags.COSINE}:
            return
        numbers = group_numbers(optimizer)
        layers = [layer for layer in self._steps if self._moved[layer].parameter in numbers]
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale
        self._gradients["gradient_norm"] |= self._gradient_norms(layers, scale)
        if tags.COSINE in self._wanted:
            for layer, gradient in self._gradients_of(layers).items():
                w = local_part(self._moved[layer].parameter)
                wide = torch.promote_types(w.dtype, torch.float32)
                self._products[layer] = (w.to(wide) * gradient).sum() / scale

    def _gradients_of(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return this rank's parts of the gradients, of the layers that have one."""
        held = {layer: self._moved[layer].parameter.grad for layer in layers}
        return {k: local_part(grad).to_dense() for k, grad in held.items() if grad is not None}

    @torch.no_grad()
    def _gradient_norms(self, layers: Sequence[str], scale: float | Tensor) -> dict[str, Tensor]:
        norms = self._local_norms(self._gradients_of(layers))
        return {layer: norm / scale for layer, norm in norms.items()}

    @property
    def has_steps(self) -> bool:
        """Whether any step was begun since the last reading."""
        return bool(self._steps)

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Measure the steps that were begun, and return (L,) values of the recorder's weights.

        They are by quantity, NaN for weights that were not measured. A second call does nothing.
        """
        if self.norms is None:
            self._measure(list(self._steps))
        places = {layer: number for number, layer in enumerate(self.layers)}
        columns = {}
        for name, (layers, values) in self._values.items():
            if len(layers) < len(places):
                whole = values.new_full((len(places),), math.nan)
                whole[[places[layer] for layer in layers]] = values
                values = whole
            columns[name] = values
        return columns

    def _measure(self, layers: list[str]) -> None:
        local = self._measure_parts(layers)
        after = local.pop("after", {})
        known = [after[layer] for layer in self._moved] if len(after) == len(self._moved) else None
        self.norms = self.recorder.norms(known)
        norms = dict(zip(self.layers, self.norms, strict=True))
        if "effective_lr" in self._wanted:
            self._add_rates(layers, norms)
        if "spectral_norm" in self._wanted:
            weights = {layer: self._moved[layer] for layer in layers}
            self._values["spectral_norm"] = layers, self._power_iteration(weights)
        if layers and self._wanted & {*_OF_STEPS, *_OF_GRADIENTS, tags.COSINE}:
            self._add_sums(norms, local)

    def _measure_parts(self, layers: list[str]) -> dict[str, dict[str, Tensor]]:
        """Return the norms before and after the steps and of them, of this rank's parts."""
        kept = {layer: self._before[layer] for layer in layers if layer in self._before}
        if not (kept and self._wanted & {*_OF_STEPS}):
            return {"before": self._local_norms(kept)} if kept else {}
        moved = [self._moved[layer] for layer in kept]
        layouts, kernels = [w.layout for w in moved], self.recorder.kernels
        found = step_norms([w.parameter for w in moved], list(kept.values()), layouts, kernels)
        named = zip(("after", "before", "step"), found, strict=True)
        return {name: dict(zip(kept, norms, strict=True)) for name, norms in named}

    def _add_rates(self, layers: list[str], norms: Mapping[str, Tensor]) -> None:
        known = [layer for layer in layers if self._steps[layer].power is not None]
        if known:
            medians = torch.stack([norms[layer].float().nanmedian() for layer in known])
            steps = [self._steps[layer] for layer in known]
            columns = [(s.learning_rate, s.momentum, float(s.power or 0)) for s in steps]
            rate, momentum, power = torch.tensor(columns).to(medians.device).unbind(1)
            rates = effective_learning_rates(medians, rate, power=power, momentum=momentum)
            self._values["effective_lr"] = known, rates

    def _add_sums(self, after: Mapping[str, Tensor], local: dict[str, dict[str, Tensor]]) -> None:
        """Add what follows from the norms of weights, of steps and of gradients."""
        local |= {name: known for name, known in self._gradients.items() if known}
        norms = self._join(local)
        if not norms:
            return
        layers = list(norms.get("step", ()))
        if layers:
            of_step = norms["before"], after, norms["step"]
            flat = [torch.cat([each[layer] for layer in layers]) for each in of_step]
            angles = torch.split(rotations(*flat), [len(after[k]) for k in layers])
            norms["rotation"] = dict(zip(layers, angles, strict=True))
        means = _layer_rms([norm for each in norms.values() for norm in each.values()])
        split = torch.split(means, list(map(len, norms.values())))
        found = {name: (list(norms[name]), part) for name, part in zip(norms, split, strict=True)}
        if layers:
            found["step_norm"] = found["step"]
            found["update_ratio"] = layers, found["step"][1] / found["before"][1]
        if self._products:
            names = list(self._products)
            parameters = [self._moved[layer].parameter for layer in names]
            products = torch.stack(join_parts(list(self._products.values()), parameters))
            known = [[norms[x][k] for k in names] for x in ("before", "gradient_norm")]
            lengths = math.prod(map(_layer_rms, known), start=torch.ones_like(products))
            counts = torch.tensor([self._moved[layer].channels for layer in names])
            counts = counts.to(products, non_blocking=True)
            found[tags.COSINE] = names, products / lengths / counts
        self._values |= {name: each for name, each in found.items() if name in self._wanted}

    def _local_norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layouts = [self._moved[layer].layout for layer in tensors]
        norms = local_norms(list(tensors.values()), layouts, self.recorder.kernels)
        return dict(zip(tensors, norms, strict=True))

    def _join(self, local: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the norms of all ranks' channels, by quantity and layer."""
        weights = [self._moved[layer] for each in local.values() for layer in each]
        norms = [norm for each in local.values() for norm in each.values()]
        joined = iter(
            join_norms(norms, [w.parameter for w in weights], [w.layout for w in weights])
        )
        return {name: {layer: next(joined) for layer in each} for name, each in local.items()}

    def read(self, reading: DeviceReading | None = None) -> dict[str, float]:
        """Return by tag what was measured and steered, with the rest of a reading; forget it."""
        reading = reading or DeviceReading()
        self.finish()
        if self.norms is not None and "weight_norm" in self._wanted:
            names = [tags.norm_tag(layer, name) for layer in self.layers for name in STATISTICS]
            reading.add(names, summarise_channels([each.float() for each in self.norms]))
        for quantity, (layers, found) in self._values.items():
            reading.add([f"{quantity}/{layer}" for layer in layers], found)
        factors = {name: f for handle in self.handles for name, f in handle.factors().items()}
        if factors:
            layers = [tags.layer_of(name) for name in factors]
            names = [tags.factor_tag(layer, name) for layer in layers for name in STATISTICS]
            reading.add(names, summarise_channels([f.float() for f in factors.values()]))
        if self.handles:
            counts = [handle.skipped_on_device for handle in self.handles]
            reading.add([tags.STEERING_SKIPPED], torch.stack(counts).sum())
        values = reading.read()
        if "rotation" in self._wanted:
            expected = {layer: step.equilibrium for layer, step in self._steps.items()}
            values |= {tags.EQUILIBRIUM + k: v for k, v in expected.items() if v is not None}
        self.forget()
        return values

    def forget(self) -> None:
        """Drop the steps that were begun."""
        self._steps, self._products = {}, {}
        self.norms, self._values = None, {}
        self._gradients = {name: {} for name in _OF_GRADIENTS}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to measure the same."""
        return {"power_iteration": dict(self._power_iteration.vectors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from there."""
        self._power_iteration.vectors = dict(state["power_iteration"])


def _layer_rms(values: Sequence[Tensor]) -> Tensor:
    """Return (L,), the root mean square of each layer's channels, of those that are not NaN."""
    return reduce_channels(values, lambda rows: rows.square().nanmean(1)).sqrt()

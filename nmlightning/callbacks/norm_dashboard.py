"""Weight norms, effective learning rates and int8 angles in the logs of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import SkippedSteps
from nmlightning.compat import logged_step, logging_is_due
from nmlightning.optim.families import expected_rotation, group_numbers, known_power
from nmlightning.optim.step_hooks import StepHookHandle
from nmlightning.probe.directions import DirectionWatch
from nmlightning.reports import tags
from nmlightning.weights.channel_norms import (
    STATISTICS,
    effective_learning_rates,
    gather_channels,
    rotations,
    summarise_channels,
)
from nmlightning.weights.layer_weights import LayerWeight
from nmlightning.weights.recorder import Recorder


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


def log_scalars(
    trainer: pl.Trainer, values: Mapping[str, float], others: Mapping[str, float], step: int
) -> None:
    """Log all values to TensorBoard, as one event, and `others` to other kinds of loggers."""
    for logger in trainer.loggers:
        writer = _tensorboard_writer(logger)
        if writer is None:
            logger.log_metrics(dict(others), step)
        else:
            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            writer._get_file_writer().add_summary(Summary(value=points), step)


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


def _tensorboard_writer(logger: Any) -> Any | None:
    """Return the SummaryWriter of a logger by its type: a DummyLogger's has every attribute."""
    experiment = getattr(logger, "experiment", None)
    homes = (cls.__module__ for cls in type(experiment).__mro__)
    return experiment if "torch.utils.tensorboard.writer" in homes else None


_HEATMAPS = 10  # in a run
_HISTOGRAM_BINS = 30  # at most; TensorBoard shows 30


class NormDashboard:
    """Logs a run's weight norms; every rank calls it, and the first one writes.

    At the steps at which the Trainer logs, for each layer: the smallest, mean and largest norm of
    its channels, their median effective learning rate, the root mean square rotation of this step
    beside the one at equilibrium, the factors of steering, and of `angles` those by which rounding
    turns what the layer computes with; all of them wait for the device once. At the end of an
    epoch, in TensorBoard: a histogram of each layer's norms, and ten times a run a picture of them
    over the epochs.

    All tags begin with `prefix`. The page of Custom Scalars shows what has been logged so far; the
    charts of several trackers are on one, of `layouts` by prefix.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        recorder: Recorder,
        handles: Sequence[StepHookHandle] = (),
        *,
        by_layer: bool = False,
        prefix: str = "",
        layouts: dict[str, tags.Layout] | None = None,
        angles: DirectionWatch | None = None,
    ) -> None:
        self._trainer, self._by_layer, self._prefix = trainer, by_layer, prefix
        self._recorder = recorder
        self._handles = handles
        self._weights = {tags.layer_of(weight.name): weight for weight in recorder.weights}
        self._angles = angles
        names = [] if angles is None else angles.__enter__().layers
        self._layers = list(dict.fromkeys([*self._weights, *names]))
        self._skipped = SkippedSteps(trainer)
        self._steps: dict[str, _Step] = {}
        self.layouts = {} if layouts is None else layouts
        self.layouts[prefix] = {}
        self._logged: set[str] = set()  # tags
        self._metrics: set[str] = set()

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep the weights that this step may turn, if it is one to be logged."""
        self._skipped.attempt()
        if not logging_is_due(self._trainer):
            return
        numbers = group_numbers(optimizer)
        for layer, weight in self._weights.items():
            if weight.parameter in numbers and weight.computed is None:
                group = optimizer.param_groups[numbers[weight.parameter]]
                self._steps[layer] = _Step(
                    weight,
                    weight.parameter.detach().clone(),
                    float(group["lr"]),
                    float(group.get("momentum", 0.0)),
                    known_power(optimizer),
                    expected_rotation(optimizer, group),
                )

    @torch.no_grad()
    def after_batch(self) -> None:
        """Log the steps that were kept, and the weights they led to."""
        if not self._steps:
            return
        reading = DeviceReading()
        self._add_weights(reading)
        self._add_steering(reading)
        if self._angles is not None:
            for (layer, tensor), angles in self._angles.take_angles().items():
                reading.add([tags.angle_tag(layer, tensor)], angles)
        if self._skipped.watches:
            reading.add([tags.SKIPPED_STEPS], self._skipped.count())
        values = reading.read()
        for layer, step in self._steps.items():
            values |= step.rates(layer, values[tags.norm_tag(layer, "median")])
        self._steps = {}
        if self._trainer.is_global_zero:
            others = values if self._by_layer else pool_layers(values, self._layers)
            all_tags, few = (
                {self._prefix + tag: value for tag, value in logged.items()}
                for logged in (values, others)
            )
            log_scalars(self._trainer, all_tags, few, logged_step(self._trainer))
        self._lay_out(values)

    def end_epoch(self) -> None:
        """Show the recorded norms in TensorBoard."""
        step, norms_of = logged_step(self._trainer), self._recorder.norms_by_epoch()
        epochs = max(map(len, norms_of.values()), default=1) - 1
        expected = max(self._trainer.max_epochs or 0, 1)
        pictures_are_due = epochs % -(-expected // _HEATMAPS) == 0 or epochs == expected
        for writer in self._writers():
            for layer, weight in self._weights.items():
                norms = norms_of[weight.name]
                if np.isfinite(norms[-1]).all():  # others have no histogram
                    tag = self._prefix + tags.norm_tag(layer)
                    bins = min(math.isqrt(weight.channels - 1) + 1, _HISTOGRAM_BINS)
                    writer.add_histogram(tag, norms[-1], step, bins=bins)
                if pictures_are_due:
                    picture = draw_heatmap(norms)
                    tag = self._prefix + tags.NORM_MAP + layer
                    writer.add_image(tag, picture, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": int(self._skipped.count())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._skipped.resume_from(state["skipped_steps"])

    def close(self, *, finished: bool) -> None:
        self._skipped.remove()
        if self._angles is not None:
            self._angles.__exit__()
        if finished:
            self._lay_out({})

    def _add_weights(self, reading: DeviceReading) -> None:
        norms = [weight.norms().float() for weight in self._weights.values()]
        names = [tags.norm_tag(layer, name) for layer in self._weights for name in STATISTICS]
        reading.add(names, summarise_channels(norms))
        turned = [step.rotation() for step in self._steps.values()]
        reading.add([tags.ROTATION + layer for layer in self._steps], torch.stack(turned))

    def _add_steering(self, reading: DeviceReading) -> None:
        factors = {name: f for handle in self._handles for name, f in handle.factors().items()}
        if factors:
            layers = [tags.layer_of(name) for name in factors]
            names = [tags.factor_tag(layer, name) for layer in layers for name in STATISTICS]
            reading.add(names, summarise_channels([f.float() for f in factors.values()]))
        if self._handles:
            counts = [handle.skipped_on_device for handle in self._handles]
            reading.add([tags.STEERING_SKIPPED], torch.stack(counts).sum())

    def _lay_out(self, values: Mapping[str, float]) -> None:
        """Show what was logged since the last time as well."""
        metrics = set() if self._prefix else set(self._trainer.logged_metrics)
        if values.keys() <= self._logged and metrics <= self._metrics:
            return
        self._logged |= values.keys()
        self._metrics |= metrics
        self.layouts[self._prefix] = tags.dashboard_layout(
            self._layers, self._logged, self._metrics, self._prefix
        )
        layout = {k: v for part in self.layouts.values() for k, v in part.items()}
        for writer in self._writers():
            writer.add_custom_scalars(layout)  # the last one counts

    def _writers(self) -> list[Any]:
        loggers = self._trainer.loggers if self._trainer.is_global_zero else []
        return list(filter(None, map(_tensorboard_writer, loggers)))


@dataclass(frozen=True)
class _Step:
    """A weight before a step, and the rates of that step."""

    weight: LayerWeight
    values: Tensor
    learning_rate: float
    momentum: float
    power: int | None
    equilibrium: float | None

    def rotation(self) -> Tensor:
        """Return the root mean square angle, over channels that have one, to the weight now."""
        angles = rotations(self.values, self.weight.parameter, self.weight.layout)
        return gather_channels(angles).float().square().nanmean().sqrt()

    def rates(self, layer: str, norm: float) -> dict[str, float]:
        """Return, by tag, the effective learning rate at a norm, and the rotation to expect."""
        rates = {}
        if self.power is not None:
            norms, rate, momentum = torch.tensor(norm), self.learning_rate, self.momentum
            effective = effective_learning_rates(norms, rate, power=self.power, momentum=momentum)
            rates[tags.EFFECTIVE_LR + layer] = float(effective)
        if self.equilibrium is not None:
            rates[tags.EQUILIBRIUM + layer] = self.equilibrium
        return rates


_TICKS = {1 / 8: "1/8", 1 / 2: "1/2", 1 / 1.2: "1/1.2", 1: "1", 1.2: "1.2", 2: "2", 8: "8"}


def draw_heatmap(norms: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3): epochs to the right, channels downwards, and a scale of colours.

    A colour stands for a multiple of the mean norm of the layer's channels at the start, and for
    the same one in all pictures: white is 1, the ends are 1/8 or less and 8 or more. It changes
    fastest about 1, as the root of the logarithm does. What is not finite is grey.

    Args:
        norms: (1 + T, C), of C channels at the start and at the end of T epochs.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    begin = norms[0][np.isfinite(norms[0]) & (norms[0] > 0)]
    start = begin.mean(dtype=np.float64) if len(begin) else 1.0
    figure = Figure((3.5, 2.7), dpi=100)  # as large as TensorBoard shows it
    axes = figure.add_axes((0.16, 0.17, 0.6, 0.7), xlabel="epoch")
    axes.set_ylabel("channel", labelpad=-6)  # between the first number and the last
    colours = colormaps["RdBu_r"].with_extremes(bad="grey")
    places = _place_colours(norms.T / start)
    axes.imshow(places, colours, Normalize(-1, 1), aspect="auto", interpolation="nearest")
    axes.set(xticks=sorted({0, len(norms) - 1}), yticks=sorted({0, len(places) - 1}))
    figure.text(0.98, 0.91, "norm / mean at the start", ha="right")
    bar = figure.add_axes((0.79, 0.17, 0.05, 0.7), xticks=[])
    shades = np.linspace(1, -1, 99)[:, None]
    bar.imshow(shades, colours, aspect="auto", interpolation="nearest", extent=(0, 1, -1, 1))
    bar.yaxis.tick_right()
    bar.set_yticks(_place_colours(np.array([*_TICKS])), labels=[*_TICKS.values()])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _place_colours(ratios: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return where ratios are in the colours, from -1 to 1; NaN for what is not finite."""
    with np.errstate(all="ignore"):
        shares = np.log2(ratios, dtype=np.float64).clip(-3, 3) / 3
    places: NDArray[np.float64] = np.sign(shares) * np.sqrt(np.abs(shares))
    places[~np.isfinite(ratios)] = np.nan
    return places

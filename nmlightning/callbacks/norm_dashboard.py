"""Weight norms, effective learning rates and int8 angles in the logs of a run."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.optim import Optimizer

from nmlightning.callbacks.epoch_clock import SkippedSteps
from nmlightning.compat import logged_step, logging_is_due
from nmlightning.probe.directions import DirectionWatch
from nmlightning.reports import tags
from nmlightning.tracking.step_meter import DeviceReading, StepMeter, pool_layers


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


def _tensorboard_writer(logger: Any) -> Any | None:
    """Return the SummaryWriter of a logger by its type: a DummyLogger's has every attribute."""
    experiment = getattr(logger, "experiment", None)
    homes = (cls.__module__ for cls in type(experiment).__mro__)
    return experiment if "torch.utils.tensorboard.writer" in homes else None


_HEATMAPS = 10  # in a run
_HISTOGRAM_BINS = 30  # at most; TensorBoard shows 30


class NormDashboard:
    """Logs a run's weight norms; every rank calls it, and the first one writes.

    At the steps at which the Trainer logs, for each layer: what the `meter` measures, the rotation
    at equilibrium, the factors of steering, and of `angles` those by which rounding turns what the
    layer computes with; all of them wait for the device once. At the end of an
    epoch, in TensorBoard: a histogram of each layer's norms, and ten times a run a picture of them
    over the epochs.

    All tags begin with `prefix`. The page of Custom Scalars shows what has been logged so far; the
    charts of several trackers are on one, of `layouts` by prefix.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        meter: StepMeter,
        *,
        by_layer: bool = False,
        prefix: str = "",
        layouts: dict[str, tags.Layout] | None = None,
        angles: DirectionWatch | None = None,
    ) -> None:
        self._trainer, self._by_layer, self._prefix = trainer, by_layer, prefix
        self._meter, self._angles = meter, angles
        names = [] if angles is None else angles.__enter__().layers
        self._layers = list(dict.fromkeys([*meter.layers, *names]))
        self._skipped = SkippedSteps(trainer)
        self.layouts = {} if layouts is None else layouts
        self.layouts[prefix] = {}
        self._logged: set[str] = set()  # tags
        self._metrics: set[str] = set()

    def before_step(self, optimizer: Optimizer) -> None:
        """Note an attempt; the meter keeps what this step may move."""
        self._skipped.attempt()

    @torch.no_grad()
    def after_batch(self) -> None:
        """Log the steps that were kept, and the weights they led to."""
        if not (self._meter.has_steps and logging_is_due(self._trainer)):
            return
        reading = DeviceReading()
        if self._angles is not None:
            for (layer, tensor), angles in self._angles.take_angles().items():
                reading.add([tags.angle_tag(layer, tensor)], angles)
        if self._skipped.watches:
            reading.add([tags.SKIPPED_STEPS], self._skipped.count())
        values = self._meter.read(reading)
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
        step, norms_of = logged_step(self._trainer), self._meter.recorder.norms_by_epoch()
        epochs = max(map(len, norms_of.values()), default=1) - 1
        expected = max(self._trainer.max_epochs or 0, 1)
        pictures_are_due = epochs % -(-expected // _HEATMAPS) == 0 or epochs == expected
        for writer in self._writers():
            for layer, weight in self._meter.layers.items():
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

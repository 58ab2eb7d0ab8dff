"""Test what a run's logs show of its weight norms, and the pictures of them."""

import csv
import itertools
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor

from lightning_modules import Trains, make_data, make_trainer, package_of
from nmlightning.callbacks import WeightNormTracker
from nmlightning.callbacks.norm_dashboard import draw_heatmap
from nmlightning.errors import InputError
from nmlightning.int8.layers import INT8_CLASSES
from nmlightning.int8.quantizer import direction_cosine, symmetric_grid
from nmlightning.optim import LRCorrection
from nmlightning.reports.tags import dashboard_layout, group_by_stage, norm_tag
from nmlightning.tracking.step_meter import QUANTITIES, DeviceReading
from nmlightning.weights.channel_norms import channel_norms, equilibrium_rotation
from nmlightning.weights.history import NormHistory
from optim_rules import channel_angles
from trainers import quiet_trainer

LAYERS = ["net.0", "net.3", "net.7"]
EPOCHS, BATCHES, EVERY = 3, 6, 2
RATE, MOMENTUM, DECAY = 0.1, 0.5, 0.01


class Notes:
    """Notes its weights before and after each step."""

    def __init__(self, overflow_at: int = -1, **options: Any) -> None:
        super().__init__()
        self.options = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY} | options
        self.overflow_at = overflow_at
        self.weights = [self.copies()]

    def copies(self) -> dict[str, Tensor]:
        return {layer: self.net[int(layer[4:])].weight.detach().clone() for layer in LAYERS}  # type: ignore[attr-defined]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])  # type: ignore[attr-defined]
        return loss * math.inf if index == self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.options)  # type: ignore[attr-defined]

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.copies())


class PlModule(Notes, Trains, pytorch_lightning.LightningModule):
    pass


class UnifiedModule(Notes, Trains, lightning.pytorch.LightningModule):
    pass


def fit(folder: Path, tracker: WeightNormTracker, make: Any = PlModule, **options: Any) -> Any:
    """Return the module after a run with a logger, `logger` if that is given, in `folder`."""
    torch.manual_seed(0)
    module = make(**options.pop("module", {}))
    start = options.pop("start", None)
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "default_root_dir": folder,
        "logger": package_of(make).loggers.TensorBoardLogger(folder, "", ""),
        "log_every_n_steps": EVERY,
    }
    trainer = make_trainer(make, tracker, **settings | options)
    trainer.fit(module, make_data(BATCHES), ckpt_path=start)
    return module


def read_events(folder: Path) -> EventAccumulator:
    """Return what is in the one event file of a folder."""
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0, "histograms": 0})
    return events.Reload()


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = read_events(folder)
    return {
        tag: {point.step: point.value for point in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("make", [PlModule, UnifiedModule])
def test_dashboard_logs_scalars(make: Any, tmp_path: Path) -> None:
    module = fit(tmp_path, WeightNormTracker(), make)
    scalars = read_scalars(tmp_path)
    logged = range(EVERY - 1, EPOCHS * BATCHES, EVERY)
    equilibrium = equilibrium_rotation(RATE, DECAY, momentum=MOMENTUM)
    for layer in LAYERS:
        for step in logged:
            before, after = (module.weights[step + late][layer] for late in (0, 1))
            norms = channel_norms(after)
            expected = {
                f"weight_norm/{layer}/min": norms.min(),
                f"weight_norm/{layer}/mean": norms.mean(),
                f"weight_norm/{layer}/max": norms.max(),
                f"effective_lr/{layer}": RATE / (1 - MOMENTUM) / norms.median() ** 2,
                f"rotation/{layer}": channel_angles(before, after).square().mean().sqrt(),
                f"rotation_equilibrium/{layer}": equilibrium,
            }
            for tag, value in expected.items():
                assert list(scalars[tag]) == list(logged)
                assert scalars[tag][step] == pytest.approx(float(value), rel=1e-5), tag
    kinds = {tag.split("/")[0] for tag in scalars}
    assert kinds == {"weight_norm", "effective_lr", "rotation", "rotation_equilibrium"}


def test_dashboard_logs_what_is_known_of_other_optimizers(tmp_path: Path) -> None:
    module = fit(tmp_path, WeightNormTracker(), module={"dampening": 0.1})
    assert not any(tag.startswith("rotation_equilibrium") for tag in read_scalars(tmp_path))
    module.configure_optimizers = lambda: torch.optim.Adagrad(module.parameters())
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path / "adagrad", "", "")
    trainer = quiet_trainer(WeightNormTracker(), logger=logger, log_every_n_steps=1)
    trainer.fit(module, make_data(1))
    names = {tag.split("/")[0] for tag in read_scalars(tmp_path / "adagrad")}
    assert names == {"weight_norm", "rotation"}


def test_dashboard_logs_factors_of_steering(tmp_path: Path) -> None:
    fit(tmp_path / "recorded", WeightNormTracker())
    history = NormHistory.load(tmp_path / "recorded")
    rule = LRCorrection(history, max_rotation=None)
    module = fit(tmp_path / "steered", WeightNormTracker(steering=rule), module={"weight_decay": 0})
    scalars = read_scalars(tmp_path / "steered")
    step = EPOCHS * BATCHES - 1
    initial = channel_norms(module.weights[0]["net.3"])
    reference = history.at(epoch=EPOCHS - 1 / BATCHES, align="interpolate")["net.3.weight"]
    factors = (initial / torch.from_numpy(reference)) ** 2
    for name in ("min", "mean", "max"):
        found = scalars[f"correction_factor/net.3/{name}"][step]
        assert found == pytest.approx(float(getattr(factors, name)()), rel=1e-5)
    assert "correction_factor/net.7/mean" not in scalars
    assert set(scalars["steering/skipped_steps"].values()) == {0.0}


def test_dashboard_logs_pictures_and_histograms(tmp_path: Path) -> None:
    fit(tmp_path, WeightNormTracker())
    events = read_events(tmp_path)
    history = NormHistory.load(tmp_path)
    for layer in LAYERS:
        assert len(events.Images(f"weight_norm_map/{layer}")) == EPOCHS
        histograms = events.Histograms(f"weight_norm/{layer}")
        for histogram, norms in zip(histograms, history.norms[f"{layer}.weight"][1:], strict=True):
            assert histogram.histogram_value.num == len(norms)
            assert len(histogram.histogram_value.bucket) <= len(norms) ** 0.5 + 3
            assert histogram.histogram_value.max == pytest.approx(norms.max())
    names = events.Tags()
    for kind, other in itertools.combinations(("scalars", "histograms", "images"), 2):
        assert set(names[kind]).isdisjoint(names[other])  # TensorBoard shows one kind alone


def read_layout(events: EventAccumulator) -> dict[str, dict[str, Any]]:
    """Return the last page of Custom Scalars: charts by category and title."""
    layout = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    categories = layout_pb2.Layout.FromString(layout).category
    return {each.title: {chart.title: chart for chart in each.chart} for each in categories}


def test_layout_shows_what_was_logged_and_nothing_else(tmp_path: Path) -> None:
    def training_step(self: Any, batch: list[Tensor], index: int) -> Tensor:
        self.log_dict({"train/loss": float(index), "val_ppl": 1.0}, on_step=False, on_epoch=True)
        self.log("train/loss_step", float(index))
        self.log("hidden", float(index), logger=False)
        return Notes.training_step(self, batch, index)

    make = type("Logs", (PlModule,), {"training_step": training_step})
    for folder, options in (("a", {}), ("b", {"weight_decay": 0, "dampening": 0.1})):
        fit(tmp_path / folder, WeightNormTracker(), make, module=options, max_epochs=1)
    events = read_events(tmp_path / "a")
    layout, lacking = read_layout(events), read_layout(read_events(tmp_path / "b"))
    assert list(layout)[:2] == ["Validation", "Training"]
    assert layout["Validation"].keys() == {"val_ppl"}
    assert layout["Training"].keys() == {"train/loss", "train/loss_step"}
    assert {title.split(":")[0] for title in layout.keys() - lacking.keys()} == {"net"}
    for charts in layout.values():
        for chart in charts.values():
            for band in chart.margin.series:
                assert {band.value, band.lower, band.upper} < set(events.Tags()["scalars"])
            for pattern in chart.multiline.tag:
                assert any(re.match(pattern, tag) for tag in events.Tags()["scalars"]), pattern


@pytest.mark.parametrize(
    ("stages", "layers"),
    [
        ("conv1 layer1 layer2", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]),
        ("features classifier", ["features.0", "features.4", "classifier"]),
        ("encoder decoder", [f"{n}.{i}.q" for n in ("encoder", "decoder") for i in range(2)]),
        ("encoder.0 encoder.1 fc", [*(f"encoder.{i // 15}.{i}" for i in range(30)), "fc"]),
        ("net", ["net.0", "net.3"]),
        ("all layers", ["conv", "fc"]),
        ("", []),
    ],
)
def test_layout_tells_layers_apart_by_stages_of_the_network(stages: str, layers: list[str]) -> None:
    assert list(group_by_stage(layers)) == stages.split("," if stages == "all layers" else None)
    logged = [norm_tag(x, n) for x in layers for n in ("mean", "min", "max")]
    layout = dashboard_layout(layers, logged, [])
    shown = [layer for title, charts in layout.items() if ": norms" in title for layer in charts]
    assert shown == layers
    for stage, chart in layout.get("Norm, mean over channels: a line a layer", {}).items():
        (pattern,) = chart[1]
        matched = [x for x in layers if re.match(pattern, norm_tag(x, "mean"))]
        assert matched == group_by_stage(layers)[stage]


def test_second_tracker_logs_under_its_own_tags(tmp_path: Path) -> None:
    trackers = [WeightNormTracker(include=["*.0.weight", "*.3.weight"]), WeightNormTracker(3)]
    fit(tmp_path, trackers[0], callbacks=trackers)
    events = read_events(tmp_path)
    for kind in ("scalars", "histograms", "images"):
        tags = set(events.Tags()[kind])
        seconds = {tag for tag in tags if tag.startswith("tracker2/")}
        firsts = {f"tracker2/{tag}" for tag in tags - seconds - {"epoch"}}
        assert len(firsts) > 1
        assert firsts < seconds
    steps = [point.step for point in events.Scalars("weight_norm/net.0/mean")]
    assert len(steps) == len(set(steps))
    titles = read_layout(events).keys()
    norms = "Norm, mean over channels: a line a layer"
    assert {norms, f"tracker2/{norms}"} < titles
    assert len({title for title in titles if "Training" in title}) == 0


@pytest.mark.parametrize("make", [PlModule, UnifiedModule])
def test_trackers_of_the_same_settings_are_refused(make: Any, tmp_path: Path) -> None:
    trackers = [WeightNormTracker(3), WeightNormTracker(3)]
    with pytest.raises(InputError, match=r"has 2 WeightNormTracker of the same settings.*include"):
        fit(tmp_path, trackers[0], make, callbacks=trackers)


def test_trackers_that_differ_in_what_they_log_stand_together(tmp_path: Path) -> None:
    trackers = [WeightNormTracker(), WeightNormTracker(log_norms="layers")]
    fit(tmp_path, trackers[0], callbacks=trackers)
    assert trackers[0].path != trackers[1].path


def test_dashboard_logs_ten_pictures_and_the_last_of_a_long_run(tmp_path: Path) -> None:
    fit(tmp_path, WeightNormTracker(), max_epochs=23)
    images = read_events(tmp_path).Images("weight_norm_map/net.0")
    epochs = [(image.step - 1) // BATCHES + 1 for image in images]
    assert epochs == [3, 6, 9, 12, 15, 18, 21, 23]


@pytest.mark.parametrize("by_layer", [False, True])
def test_dashboard_logs_to_csv(by_layer: bool, tmp_path: Path) -> None:
    tracker = WeightNormTracker(log_norms="layers" if by_layer else None)
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path, "", "")
    module = fit(tmp_path, tracker, logger=logger)
    layer = "net.0" if by_layer else "all"
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[f"weight_norm/{layer}/max"]]
    assert [int(row["step"]) for row in rows] == list(range(1, EPOCHS * BATCHES, EVERY))
    norms = {name: channel_norms(module.weights[-1][name]) for name in LAYERS}
    largest = norms["net.0"].max() if by_layer else max(n.max() for n in norms.values())
    last = rows[-1]
    assert float(last[f"weight_norm/{layer}/max"]) == pytest.approx(float(largest))
    if by_layer:
        assert len(last) == 1 + 7 * len(LAYERS)  # the step, and the kinds of values
        return
    turned = [channel_angles(module.weights[-2][n], module.weights[-1][n]) for n in LAYERS]
    mean_squares = [angles.square().mean() for angles in turned]
    assert {k: float(v) for k, v in last.items() if "/" in k} == pytest.approx(
        {
            "weight_norm/all/min": float(min(n.min() for n in norms.values())),
            "weight_norm/all/mean": float(sum(n.mean() for n in norms.values())) / 3,
            "weight_norm/all/max": float(largest),
            "effective_lr/all": sorted(RATE / 0.5 / float(n.median()) ** 2 for n in norms.values())[
                1
            ],
            "rotation/all": float(sum(mean_squares) / 3) ** 0.5,
            "rotation_equilibrium/all": equilibrium_rotation(RATE, DECAY, momentum=MOMENTUM),
        },
        rel=1e-5,
    )


class Int8Module(PlModule):
    """Has layers in int8 of 8 bits, whose gradients have 3."""

    def build(self) -> None:
        super().build()
        for layer in LAYERS:
            module = self.get_submodule(layer)
            module.__class__ = INT8_CLASSES[type(module)]
            module.set_up(gradient_bits=3)


def test_dashboard_logs_angles_of_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = DeviceReading.read
    monkeypatch.setattr(DeviceReading, "read", lambda self: reads.append(1) or read(self))
    tracker = WeightNormTracker(log_int8=True)
    module = fit(tmp_path, tracker, Int8Module, accumulate_grad_batches=2, log_every_n_steps=2)
    scalars = read_scalars(tmp_path)
    angles = {tag: values for tag, values in scalars.items() if tag.startswith("int8_angle/")}
    tensors = {layer: ["input", "weight", "gradient"] for layer in LAYERS}
    tensors["net.0"].remove("gradient")  # images want none
    assert set(angles) == {f"int8_angle/{n}/{x}" for n, each in tensors.items() for x in each}
    assert all(list(each) == list(scalars["rotation/net.0"]) for each in angles.values())
    for step, angle in angles["int8_angle/net.3/weight"].items():
        weight = module.weights[2 * step]["net.3"]
        cosine = direction_cosine(weight, symmetric_grid(weight, 8))
        assert angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
        assert 1 < angles["int8_angle/net.3/gradient"][step] < 90
    charts = read_layout(read_events(tmp_path))
    (pattern,) = charts["Angle of rounding the input, degrees: a line a layer"]["net"].multiline.tag
    assert all(re.match(pattern, f"int8_angle/{layer}/input") for layer in LAYERS)
    assert len(reads) == len(angles["int8_angle/net.3/weight"])
    assert not any(module._forward_hooks for module in module.modules())


def test_dashboard_logs_the_largest_angle_to_csv(tmp_path: Path) -> None:
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path, "", "")
    fit(tmp_path, WeightNormTracker(log_int8=True), Int8Module, logger=logger)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["int8_angle/all/gradient"]]
    assert [int(row["step"]) for row in rows] == list(range(1, EPOCHS * BATCHES, EVERY))
    assert all(0 < float(row["int8_angle/all/weight"]) < 1 for row in rows)


def test_log_int8_wants_layers_in_int8(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no layer in int8 in PlModule: add Int8Swap to"):
        fit(tmp_path, WeightNormTracker(log_int8=True))


def test_log_norms_is_checked() -> None:
    with pytest.raises(
        InputError, match=r"log_norms is None or True or False or 'layers', got 'layer'\. "
    ):
        WeightNormTracker(log_norms="layer")  # type: ignore[arg-type]


def make_scaler() -> Any:
    """Return the precision of a run whose gradients a GradScaler scales."""
    return pytorch_lightning.plugins.MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_dashboard_logs_skipped_steps_through_a_resume(fused: bool, tmp_path: Path) -> None:
    overflows = {"overflow_at": 2, "fused": fused}
    start: dict[str, Any] = {"max_epochs": 2}
    for folder, counts in ((tmp_path, [0, 1, 1, 1, 2, 2]), (tmp_path / "3", [2, 3, 3])):
        options = {"plugins": [make_scaler()], "module": overflows, **start}
        fit(folder, WeightNormTracker(), **options).trainer.save_checkpoint(tmp_path / "last.ckpt")
        skipped = read_scalars(folder)["optimizer/skipped_steps"]
        assert list(skipped.values()) == counts
        start = {"start": tmp_path / "last.ckpt"}


def test_dashboard_starts_anew_with_each_fit(tmp_path: Path) -> None:
    tracker = WeightNormTracker()
    fit(tmp_path / "0", tracker)
    fit(tmp_path / "1", tracker, logger=False)
    fit(tmp_path / "2", tracker)
    assert list(read_scalars(tmp_path / "0")) == list(read_scalars(tmp_path / "2"))
    assert [p.name for p in (tmp_path / "1").iterdir()] == ["weight_norms.safetensors"]


def test_dashboard_logs_once_for_accumulated_batches(tmp_path: Path) -> None:
    module = fit(tmp_path, WeightNormTracker(), accumulate_grad_batches=2, log_every_n_steps=1)
    scalars = read_scalars(tmp_path)
    assert list(scalars["rotation/net.0"]) == list(range(EPOCHS * BATCHES // 2))
    before, after = (module.weights[batch]["net.0"] for batch in (3, 4))
    expected = channel_angles(before, after).square().mean().sqrt()
    assert scalars["rotation/net.0"][1] == pytest.approx(float(expected), rel=1e-5)


def test_dashboard_without_a_logger_or_left_out(tmp_path: Path) -> None:
    fit(tmp_path, WeightNormTracker(), logger=False)
    assert not list(tmp_path.glob("events*"))
    fit(tmp_path, WeightNormTracker(log_norms=False))
    assert not list(tmp_path.glob("events*")) or not read_scalars(tmp_path)
    with pytest.raises(InputError, match="has no logger to log to: give the Trainer one"):
        fit(tmp_path, WeightNormTracker(log_norms=True), logger=False)


def test_dashboard_shows_a_diverged_run(tmp_path: Path) -> None:
    fit(tmp_path, WeightNormTracker(), module={"lr": 1e30})
    scalars = read_scalars(tmp_path)
    assert not np.isfinite(list(scalars["weight_norm/net.7/mean"].values())[-1])


@pytest.mark.parametrize("fused", [False, True])
def test_chosen_quantities_are_logged_and_recorded(tmp_path: Path, fused: bool) -> None:
    """Of clipped gradients, which a GradScaler has scaled, and of which one overflows."""
    tracker = WeightNormTracker(every=2, quantities=QUANTITIES)
    seen: dict[int, Tensor] = {}

    class Clips(PlModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # Lightning has divided by the scale, but for a fused optimizer.
            scale = self.trainer.precision_plugin.scaler.get_scale() if fused else 1.0
            seen[len(seen)] = self.net[0].weight.grad.detach() / scale

    module = fit(
        tmp_path, tracker, Clips, plugins=[make_scaler()],
        gradient_clip_val=None if fused else 0.5, gradient_clip_algorithm="value",
        module={"fused": fused, "overflow_at": 3},
    )  # fmt: skip
    scalars = read_scalars(tmp_path)
    for batch in (1, 5):
        gradient, weight = seen[batch], module.weights[batch]["net.0"]
        clipped = gradient if fused else gradient.clamp(-0.5, 0.5)
        step = module.weights[batch + 1]["net.0"] - weight
        channels = len(weight) ** 0.5
        expected = {
            "unclipped_gradient_norm": gradient.norm() / channels,
            "gradient_norm": clipped.norm() / channels,
            "weight_gradient_cosine": F.cosine_similarity(weight.ravel(), clipped.ravel(), 0),
            "step_norm": step.norm() / channels,
            "update_ratio": step.norm() / weight.norm(),
        }
        history = NormHistory.load(tmp_path)
        record = history.steps.tolist().index(batch + 1)
        for name, value in expected.items():
            found = scalars[f"{name}/net.0"][batch]
            # The layer is scale-invariant: its cosine is what rounding leaves of it.
            assert found == pytest.approx(float(value), rel=1e-4, abs=1e-7), name
            assert history.quantities[name][record][0] == pytest.approx(found, rel=1e-6)
    assert set(history.quantities) == {*QUANTITIES} - {"weight_norm"}
    assert {f"{name}/net.0" for name in QUANTITIES[1:]} < scalars.keys()


def test_ends_of_epochs_have_the_quantities_of_their_last_step(tmp_path: Path) -> None:
    tracker = WeightNormTracker(quantities=["rotation"], log_norms=False)
    module = fit(tmp_path, tracker)
    found = NormHistory.load(tmp_path).quantities["rotation"]
    assert np.isnan(found[0]).all()
    for epoch in range(EPOCHS):
        last = (epoch + 1) * BATCHES
        before, after = (module.weights[batch]["net.0"] for batch in (last - 1, last))
        expected = channel_angles(before, after).square().mean().sqrt()
        assert found[epoch + 1][0] == pytest.approx(float(expected), rel=1e-5)
    assert not any(tag.startswith("rotation") for tag in read_scalars(tmp_path))


COLOURS = {x: tuple(colormaps["RdBu_r"]((x + 1) / 2, bytes=True))[:3] for x in (-1, 0, 1)}
GREY = (128, 128, 128)


def colours_of(norms: NDArray[np.float32]) -> list[list[tuple[int, ...]]]:
    """Return the colour in the middle of each cell, for each channel those of the epochs."""
    picture = draw_heatmap(norms)
    height, width, _ = picture.shape
    epochs, channels = norms.shape
    rows = height * (0.13 + 0.7 * (np.arange(channels) + 0.5) / channels)
    columns = width * (0.16 + 0.6 * (np.arange(epochs) + 0.5) / epochs)
    cells = picture[rows.astype(int)][:, columns.astype(int)]
    return [[tuple(cell) for cell in row] for row in cells.tolist()]


@pytest.mark.parametrize("start", [1.0, 1e-3, 1e20])
def test_heatmap_has_channels_down_and_epochs_across_in_multiples_of_the_start(
    start: float,
) -> None:
    norms = np.array([[1, 1, 1, np.nan], [8, 1 / 8, 0, np.inf]], dtype=np.float32) * start
    cells = colours_of(norms.astype(np.float32))
    assert [row[0] for row in cells] == [COLOURS[0]] * 3 + [GREY]
    assert [row[1] for row in cells] == [COLOURS[1], COLOURS[-1], COLOURS[-1], GREY]


def test_heatmap_has_the_same_colour_for_the_same_norm_in_all_runs_and_epochs() -> None:
    norms = np.array([[1.0, 3.0], [1.5, 2.5], [4.0, 1.0]], dtype=np.float32)
    early, late = colours_of(norms[:2]), colours_of(norms)
    assert [row[:2] for row in late] == early
    assert late[0][0] == late[1][2]


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_heatmap_of_equal_norms_has_one_colour(value: float) -> None:
    cells = colours_of(np.full((2, 2), value, np.float32))
    assert len({colour for row in cells for colour in row}) == 1
    assert (cells[0][0] == GREY) is not np.isfinite(value)


@pytest.mark.parametrize("shape", [(1, 1), (300, 4096), (5000, 3)])
def test_heatmap_size_is_that_of_any_picture(shape: tuple[int, int]) -> None:
    assert draw_heatmap(np.ones(shape, np.float32)).shape == (270, 350, 3)

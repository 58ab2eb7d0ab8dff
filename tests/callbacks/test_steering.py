"""Steering in a fit: its weights, the table of its scope, and a resume with another rule."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from nmlightning import optim
from nmlightning.callbacks import WeightNormTracker
from nmlightning.callbacks.steering import check_same_optimizer
from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from recorded_runs import Trains, make_data, make_trainer


class Mixed(pl.LightningModule):
    """Has a convolution for each reason to steer or to leave it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=1e-12)
        self.kept = nn.Conv2d(4, 4, 1)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.other = nn.Conv2d(4, 4, 1)
        self.free = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head.weight

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = self.norm(self.plain(batch)).relu()
        x = self.free(self.other(self.frozen(self.kept(x)))).mean((2, 3))
        loss: Tensor = (self.head(x) + self.tied(x)).logsumexp(1).mean()
        return loss

    def configure_optimizers(self) -> Any:
        held = [q for name, q in self.named_parameters() if not name.startswith("other")]
        return torch.optim.SGD(held, lr=0.01, momentum=0.9)


@pytest.fixture
def scope_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], tuple[str, list[tuple[str, str]]]]:
    """Fit by a rule; return what is printed, and the rows of its table without their numbers."""
    monkeypatch.setenv("COLUMNS", "120")

    def fit_mixed(steering: Any) -> tuple[str, list[tuple[str, str]]]:
        tracker = WeightNormTracker(steering=steering, list_weights=True)
        trainer = make_trainer(tmp_path, tracker, max_epochs=2)
        trainer.fit(Mixed(), DataLoader(torch.randn(8, 2, 5, 5), batch_size=4))  # type: ignore[arg-type]
        printed = capsys.readouterr().err
        rows = re.findall(r"^ (\S+\.weight) +(.*?) +$", printed, re.MULTILINE)
        return printed, [(name, re.sub(r"share [^)]*", "share", why)) for name, why in rows]

    return fit_mixed


TABLE = {
    "plain.weight": "steered: scale-invariant (radial share)",
    "kept.weight": "not steered: exclude names it",
    "frozen.weight": "not steered: it is frozen at the start",
    "other.weight": "not steered: no optimizer has it",
    "free.weight": "not steered: the loss depends on its norm (radial share)",
    "unused.weight": "steered; no gradient yet",
    "head.weight": "not steered: not a convolution (add it by include)",
}


def test_scope_table_lists_every_layer_once(scope_of: Any) -> None:
    printed, table = scope_of(optim.DecayEquivalentLR(0.01, exclude=["kept*"]))
    assert "DecayEquivalentLR steers 2 of 7 weights" in printed
    assert table == list(TABLE.items())


@pytest.mark.filterwarnings("ignore:head.weight is steered, but the loss depends on its norm")
def test_scope_table_with_include(scope_of: Any) -> None:
    _, table = scope_of(optim.DecayEquivalentLR(0.01, include=["head.weight", "plain.*"]))
    left = ("kept.weight", "free.weight", "unused.weight")
    changed = dict.fromkeys(left, "not steered: include does not name it")
    head = "steered by include: the loss depends on its norm (radial share)"
    assert table == list({**TABLE, **changed, "head.weight": head}.items())


@pytest.mark.parametrize("rule", [optim.Hyperball, optim.RadialProjection])
def test_scope_of_matrix_rules(
    rule: type[optim.Hyperball | optim.RadialProjection], scope_of: Any
) -> None:
    printed, table = scope_of(rule(exclude=["kept*"]))
    assert f"{rule.__name__} steers 4 of 7 weights" in printed
    steered = ("plain.weight", "free.weight", "unused.weight", "head.weight")
    assert table == list({**TABLE, **dict.fromkeys(steered, "steered")}.items())


def test_scope_is_printed_once_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = WeightNormTracker(steering=optim.DecayEquivalentLR(0.01))
    for number in range(2):
        make_trainer(tmp_path / str(number), tracker).fit(Trains(), make_data())
        lines = capsys.readouterr().err.splitlines()
        start = lines.index("DecayEquivalentLR steers 2 of 3 weights; not steered:")
        assert lines[start + 1] == " net.7.weight: not a convolution (add it by include)"
        assert not [line for line in lines if "scale-invariant" in line]


pytestmark = pytest.mark.filterwarnings("ignore:The recording is from a run without weight decay")


def weight_normed() -> Trains:
    module = Trains()
    nn.utils.weight_norm(module.net[0])
    return module


def pruned() -> Trains:
    module = Trains()
    prune.l1_unstructured(module.net[0], "weight", amount=0.5)
    return module


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "exclude"), [(weight_normed, ["*.weight_g"]), (pruned, [])])
def test_originals_are_recorded_and_steered_by_weight_name(
    make: Callable[[], Trains], exclude: list[str], tmp_path: Path
) -> None:
    module, tracker = make(), WeightNormTracker()
    make_trainer(tmp_path / "recorded", tracker).fit(module, make_data())
    history = NormHistory.load(tmp_path / "recorded")
    original = next(q for name, q in module.named_parameters() if name.endswith(("_v", "_orig")))
    norms = history.norms["net.0.weight_v"]
    np.testing.assert_array_equal(norms[-1], channel_norms(original))
    assert (norms[-1] != norms[0]).any()
    tracker = WeightNormTracker(steering=optim.LRCorrection(history, exclude=exclude))
    make_trainer(tmp_path / "steered", tracker).fit(make(), make_data())
    assert "net.0.weight" in tracker.handles[0].reasons()


NORMS = {"net.0.weight": [[1.0] * 4] * 2, "net.3.weight": [[1.0] * 4] * 2}
HISTORY = NormHistory.from_arrays(NORMS, [4, 8], [0, 1])


def fit(folder: Path, tracker: WeightNormTracker | None, start: Path | None = None) -> Path:
    """Train an epoch more, and return the checkpoint."""
    callbacks = [] if tracker is None else [tracker]
    trainer = make_trainer(folder, *callbacks, max_epochs=1 if start is None else 2)
    trainer.fit(Trains(), make_data(), ckpt_path=start)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            optim.DecayEquivalentLR(0.01),
            optim.LRCorrection(HISTORY),
            "was steered by DecayEquivalentLR, and this run is by LRCorrection: resume with",
        ),
        (
            optim.DecayEquivalentLR(0.01),
            optim.DecayEquivalentLR(0.02),
            "by DecayEquivalentLR with weight_decay=0.01, and this run is with weight_decay=0.02",
        ),
    ],
)
def test_resume_with_another_rule_is_refused(
    first: Any, second: Any, message: str, tmp_path: Path
) -> None:
    start = fit(tmp_path / "first", WeightNormTracker(steering=first))
    with pytest.raises(InputError, match=message) as caught:
        fit(tmp_path / "second", WeightNormTracker(steering=second), start)
    assert "\n" not in str(caught.value)


def test_resume_without_steering_warns(tmp_path: Path) -> None:
    start = fit(tmp_path / "first", WeightNormTracker(steering=optim.DecayEquivalentLR(0.01)))
    message = "checkpoint was steered by DecayEquivalentLR, and this run is not steered"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path / "second", WeightNormTracker(), start)


@pytest.mark.parametrize("tracker", [None, WeightNormTracker()])
def test_resume_with_new_steering_warns(tracker: WeightNormTracker | None, tmp_path: Path) -> None:
    start = fit(tmp_path / "first", tracker)
    message = "The checkpoint was not steered; DecayEquivalentLR steers this run from step 4 on"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path / "second", WeightNormTracker(steering=optim.DecayEquivalentLR(0.01)), start)


def test_resume_of_more_optimizers_is_refused(tmp_path: Path) -> None:
    start = fit(tmp_path / "first", WeightNormTracker(steering=optim.DecayEquivalentLR(0.01)))
    checkpoint = torch.load(start, weights_only=True)
    (tracked,) = (
        checkpoint["callbacks"][key] for key in checkpoint["callbacks"] if "Tracker" in key
    )
    states = tracked["steering"]["attachments"]
    states.append(states[0])
    torch.save(checkpoint, start)
    message = "The checkpoint was steered in 2 optimizers, and this run is in 1"
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "second", WeightNormTracker(steering=optim.DecayEquivalentLR(0.01)), start)


# ---- A recording is compared with the optimizers of the run that follows it. ----

SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def make_history(decay: float = 5e-4, *optimizers: dict[str, Any]) -> NormHistory:
    return NormHistory.from_arrays(
        {"weight": [[1.0]], "head.weight": [[1.0]]},
        [10],
        [0],
        weight_decays=[[decay, 5e-4]],
        provenance={"optimizers": list(optimizers)} if optimizers else {},
    )


def make_sgd(rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Conv2d(1, 1, 1).parameters(), lr=rate, momentum=0.9)


@pytest.mark.parametrize(
    "history",
    [make_history(5e-4, SGD), make_history(torch.nan), make_history(5e-4, {"name": "SGD"})],
)
def test_same_or_unknown_optimizer_passes(history: NormHistory) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_optimizer(history, ["weight"], [make_sgd()])


def test_other_learning_rate_warns() -> None:
    message = "a run with learning rate 0.1, and this one has 0.05; if intended"
    with pytest.warns(UserWarning, match=message):
        check_same_optimizer(make_history(5e-4, SGD), ["weight"], [make_sgd(0.05)])


def test_recording_without_weight_decay_warns() -> None:
    with pytest.warns(UserWarning, match="a run without weight decay on weight, so there is none"):
        check_same_optimizer(make_history(0.0, SGD), ["weight"], [make_sgd()])

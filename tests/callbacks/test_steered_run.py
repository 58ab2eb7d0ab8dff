"""Test what a rule is attached to in a fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.nn.utils import prune

from nmlightning.callbacks import WeightNormTracker
from nmlightning.optim import LRCorrection
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from recorded_runs import Trains, make_data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The recording is of a run without weight decay")


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
def test_originals_are_recorded_and_steered_under_the_name_of_the_weight(
    make: Callable[[], Trains], exclude: list[str], tmp_path: Path
) -> None:
    module, tracker = make(), WeightNormTracker()
    make_trainer(tmp_path / "recorded", tracker).fit(module, make_data())
    history = NormHistory.load(tmp_path / "recorded")
    original = next(q for name, q in module.named_parameters() if name.endswith(("_v", "_orig")))
    np.testing.assert_array_equal(history.norms["net.0.weight"][-1], channel_norms(original))
    assert (history.norms["net.0.weight"][-1] != history.norms["net.0.weight"][0]).any()
    tracker = WeightNormTracker(steering=LRCorrection(history, exclude=exclude))
    make_trainer(tmp_path / "steered", tracker).fit(make(), make_data())
    assert "net.0.weight" in tracker.attachments[0].reasons()

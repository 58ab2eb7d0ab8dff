from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from nmlightning.weights.recorder import Recorder


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 4, 2, groups=1), nn.Linear(4, 5))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for q in model.parameters():
            q.mul_(1.5)


def test_recorder_records() -> None:
    model = make_model()
    weights = find_layer_weights(model)
    recorder = Recorder(weights, {"seed": 3})
    assert recorder.last_step == -1
    rates = {id(weights[0].parameter): (0.1, 5e-4)}
    expected = []
    for step, epoch in ((0, 0), (4, 0), (8, 1)):
        recorder.record(step, epoch, rates)
        expected.append([channel_norms(w.parameter, layout=w.layout) for w in weights])
        change(model)
        recorder.record(step, epoch + 1, {})  # at the same step: not taken
        if step == 4:
            recorder.history()  # bringing some records to the CPU changes nothing
    history = recorder.history()
    assert recorder.last_step == 8
    assert history.steps.tolist() == [0, 4, 8]
    assert history.epochs.tolist() == [0, 0, 1]
    assert history.provenance == {"seed": 3, "finished": False}
    recorder.end_epoch()
    recorder.finish()
    assert recorder.history().provenance == {"seed": 3, "finished": True, "steps_per_epoch": 4}
    for column, (name, values) in enumerate(history.norms.items()):
        assert name == weights[column].name
        np.testing.assert_array_equal(values, torch.stack([row[column] for row in expected]))
    np.testing.assert_array_equal(history.learning_rates, [[0.1, np.nan, np.nan]] * 3)
    np.testing.assert_array_equal(history.weight_decays[:, 0], [5e-4] * 3)


def test_recorder_continues_earlier_records(tmp_path: Path) -> None:
    model = make_model()
    weights = find_layer_weights(model)
    recorder = Recorder(weights, {})
    recorder.record(0, 0, {})
    recorder.record(2, 0, {})
    recorder.save(tmp_path / "weight_norms.safetensors")
    earlier = NormHistory.load(tmp_path)
    resumed = Recorder(weights[1:], {}, earlier)
    assert resumed.last_step == 2
    resumed.record(2, 1, {})
    resumed.record(3, 1, {})
    history = resumed.history()
    assert list(history.norms) == [weight.name for weight in weights[1:]]
    assert history.steps.tolist() == [0, 2, 3]
    assert history.epochs.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(history.norms["1.weight"][:2], earlier.norms["1.weight"])
    other = find_layer_weights(nn.Sequential(nn.Conv2d(2, 9, 3)))
    with pytest.raises(InputError, match=r"0.weight has 3 output channels there and 9 here"):
        Recorder(other, {}, earlier)


def test_recorder_without_records() -> None:
    assert len(Recorder(find_layer_weights(make_model()), {}).history()) == 0

"""`track_norms` records, steers, logs and resumes in loops of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmlightning import Hyperball, InputError, NormHistory, NormTracker, track_norms
from nmlightning.tracking import norm_tracker
from nmlightning.weights.channel_norms import channel_norms
from scripts import run_python


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def take_step(net: nn.Module, *optimizers: Any, batches: int = 1) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    for _ in range(batches):
        net(torch.randn(5, 4)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_records_every_nth_step_and_the_ends_of_epochs(tmp_path: Path) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.01)
    norms = [channel_norms(net[0].weight)]
    steps = []
    with track_norms(
        net,
        optimizer,
        every=2,
        path=tmp_path,
        log=lambda _, step: steps.append(step),
        provenance={"seed": 0},
        exclude=["2.*"],
    ) as tracker:
        for _ in range(2):
            for _ in range(3):
                take_step(net, optimizer, batches=2)
                norms.append(channel_norms(net[0].weight))
            tracker.end_epoch()
    assert steps == [2, 4, 6]
    history = NormHistory.load(tmp_path)
    assert tracker.path == tmp_path / "weight_norms.safetensors"
    assert history.steps.tolist() == [0, 2, 3, 4, 6]
    assert history.epochs.tolist() == [0, 0, 0, 1, 1]
    assert list(history.norms) == ["0.weight"]
    for step, found in zip(history.steps, history.norms["0.weight"], strict=True):
        np.testing.assert_array_equal(found, norms[step].numpy())
    assert history.learning_rates[1:].tolist() == [[0.1]] * 4
    assert history.weight_decays[1:].tolist() == [[0.01]] * 4
    assert list(history.quantities) == ["rotation", "effective_lr"]
    assert np.isfinite(history.quantities["rotation"]).ravel().tolist() == [0, 1, 0, 1, 1]
    provenance = history.provenance
    assert {"seed": 0, "finished": True, "steps_per_epoch": 3}.items() <= provenance.items()
    copied = tmp_path / "copy.safetensors"
    tracker.save(copied)
    np.testing.assert_array_equal(
        NormHistory.load(copied).quantities["rotation"], history.quantities["rotation"]
    )
    assert not optimizer._optimizer_step_post_hooks


def test_optimizers_that_step_in_turn_share_a_step() -> None:
    net = make_net()
    first = torch.optim.SGD(net[0].parameters(), 0.1)
    second = torch.optim.AdamW(net[2].parameters(), 0.1)
    logged: list[tuple[dict[str, float], int]] = []
    tracker = track_norms(net, [first, second], log=lambda *each: logged.append(each))
    take_step(net, first, second)
    take_step(net, first)  # alone, as one of an adversarial pair
    take_step(net, first)
    tracker.close()
    assert [step for _, step in logged] == [1, 2, 3]
    rotations = [sorted(k for k in v if k.startswith("rotation/")) for v, _ in logged]
    assert rotations[0] == ["rotation/0", "rotation/2", "rotation/all"]
    assert rotations[1] == rotations[2] == ["rotation/0", "rotation/all"]


def test_rule_steers_and_its_factors_are_logged() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.0)
    norm = net[0].weight.norm()
    logged: list[dict[str, float]] = []
    rule = Hyperball(include=["0.weight"])
    with track_norms(net, optimizer, rule=rule, log=lambda v, _: logged.append(v)) as tracker:
        take_step(net, optimizer)
    torch.testing.assert_close(net[0].weight.norm(), norm)
    assert tracker.handles[0].steered == ["0.weight"]
    assert "correction_factor/0/mean" in logged[0]
    take_step(net, optimizer)
    assert not torch.allclose(net[0].weight.norm(), norm)


@pytest.mark.parametrize("has_path", [True, False])
def test_resume_continues_the_records(tmp_path: Path, has_path: bool) -> None:
    quantities = ["rotation", "spectral_norm"]
    options: dict[str, Any] = {"quantities": quantities, "rule": Hyperball(include=["0.weight"])}
    options |= {"path": tmp_path} if has_path else {}

    def start() -> tuple[nn.Module, Any, NormTracker]:
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.0)
        return net, optimizer, track_norms(net, optimizer, **options)

    net, optimizer, tracker = start()
    for _ in range(3):
        take_step(net, optimizer)
    states = [x.state_dict() for x in (net, optimizer, tracker)]
    states = torch.load(_saved(states, tmp_path / "state.pt"), weights_only=False)
    random = torch.get_rng_state()
    for _ in range(2):
        take_step(net, optimizer)
    whole = tracker.history
    tracker.remove()
    parts = start()
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    for _ in range(2):
        take_step(*parts[:2])
    parts[2].close()
    history = parts[2].history
    assert history.steps.tolist() == ([0, 1, 2, 3, 4, 5] if has_path else [3, 4, 5])
    for name, values in history.norms.items():
        np.testing.assert_array_equal(values, whole.norms[name][-len(history) :])
    for name in quantities:
        found, expected = history.quantities[name][-2:], whole.quantities[name][-2:]
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="steered in 1 optimizers, and this run is in 0"):
        track_norms(*parts[:2]).load_state_dict(states[2])


def _saved(state: Any, file: Path) -> Path:
    torch.save(state, file)
    return file


def test_steps_in_compiled_code_are_recorded() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    tracker = track_norms(net, optimizer, log=lambda *_: None)
    before = net[0].weight.detach().clone()

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for _ in range(2):
        net(torch.ones(3, 4)).square().mean().backward()
        step()
    assert not torch.equal(before, net[0].weight)
    assert tracker.history.steps.tolist() == [0, 1, 2]
    assert tracker.history.quantities["rotation"][1:].min() > 0


def test_lbfgs_is_measured_from_its_first_closure() -> None:
    net = make_net()
    optimizer = torch.optim.LBFGS(net.parameters(), 0.1, max_iter=3)
    logged: list[dict[str, float]] = []
    before = net[0].weight.detach().clone()
    tracker = track_norms(
        net, optimizer, quantities=["step_norm"], log=lambda v, _: logged.append(v)
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (net[0].weight.detach() - before).norm() / 8**0.5
    assert logged[0]["step_norm/0"] == pytest.approx(float(expected), rel=1e-6)
    tracker.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"rule": 3}, r"rule is a rule, such as Hyperball\(\), or None, got 3"),
        ({"log": "wandb"}, "log is a function of a dict and a step, or None, got 'wandb'"),
        ({"quantities": ["norm"]}, "a quantity is .* got 'norm'"),
        ({"quantities": "rotation"}, r"quantities is a list, got the string 'rotation'"),
        ({"include": ["x"]}, "The pattern 'x' matches no weight"),
        ({"model": nn.Linear(4, 8)}, "The optimizers move none of the model's weights"),
        ({"optimizers": []}, "takes a model, and the optimizers that train it"),
        ({"optimizers": [3]}, "attach it to the optimizer itself"),
        ({"model": None}, "takes a model, and the optimizers that train it"),
        ({"optimizers": None}, "takes a model, and the optimizers that train it"),
        ({"path": __file__}, "path is a folder to write to, got .*exists"),
        ({"path": Path(__file__) / "x"}, "path is a folder to write to, got .*Not a directory"),
        ({"path": "/proc/nope"}, "path is a folder to write to, got '/proc/nope'"),
        ({"path": 3}, "path is a folder to write to, got 3"),
        ({"provenance": {"seed": object()}}, "provenance is a mapping of plain data"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    net = make_net()
    optimizer, rule = torch.optim.SGD(net.parameters(), 0.1), Hyperball(include=["0.weight"])
    given = {"model": net, "optimizers": optimizer, "rule": rule} | options
    with pytest.raises(InputError, match=message):
        track_norms(given.pop("model"), given.pop("optimizers"), **given)
    assert not optimizer._optimizer_step_pre_hooks
    track_norms(net, optimizer, rule=rule)


@pytest.mark.parametrize("fails", ["attach", "keep_recording", "StepHooks"])
def test_an_error_detaches_what_was_attached(monkeypatch: Any, tmp_path: Path, fails: str) -> None:
    net = make_net()
    optimizers = [torch.optim.SGD(net[n].parameters(), 0.1) for n in (0, 2)]
    optimizers[1].param_groups[0]["weight_decay"] = 0.1 if fails == "attach" else 0.0
    rule = Hyperball(include=["*.weight"])
    with monkeypatch.context() as patch:
        if fails != "attach":
            made = iter([norm_tracker.StepHooks] if fails == "StepHooks" else [])
            patch.setattr(norm_tracker, fails, lambda *args: next(made)(*args))
        with pytest.raises((InputError, StopIteration)):
            track_norms(net, optimizers, rule=rule, path=tmp_path)
    assert not any(each._optimizer_step_pre_hooks for each in optimizers)
    optimizers[1].param_groups[0]["weight_decay"] = 0.0
    assert len(track_norms(net, optimizers, rule=rule).handles) == 2


@pytest.mark.parametrize("case", ["replaced", "not measured", "as it should be"])
def test_what_stays_silent_is_said_once(recwarn: pytest.WarningsRecorder, case: str) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    logged: list[Any] = []
    only = ["unclipped_gradient_norm"]
    with track_norms(net, optimizer, quantities=only, log=lambda *v: logged.append(v)) as tracker:
        for _ in range(3):
            if case == "as it should be":
                net(torch.ones(3, 4)).sum().backward()
                tracker.measure()
            if case != "replaced":
                optimizer.step()
        tracker.end_epoch()
    said = {"replaced": ["No tracked optimizer has stepped"], "not measured": ["call measure()"]}
    for warning, text in zip(recwarn.list, said.get(case, []), strict=True):
        assert text in str(warning.message)
    assert [step for _, step in logged] == ([1, 2, 3] if case == "as it should be" else [])


def test_it_imports_no_lightning() -> None:
    code = "import sys, nmlightning; nmlightning.track_norms; print(*sys.modules)"
    imported = run_python("-c", code).stdout.split()
    assert {"lightning", "pytorch_lightning"}.isdisjoint(imported)
    assert "nmlightning.tracking.norm_tracker" in imported

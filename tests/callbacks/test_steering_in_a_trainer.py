"""Every rule in a Trainer that skips, clips, accumulates, averages, compiles: as a plain loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optim_rules
from nmlightning.callbacks import WeightNormTracker
from nmlightning.errors import InputError
from nmlightning.optim import DecayEquivalentLR
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory
from optim_rules import ANY_MATRIX, IMPLEMENTATIONS
from trainers import quiet_trainer

RULES = {name: make for name, make in optim_rules.RULES.items() if name != "layer"}
REFERENCED = ("stable", "paper", "schedule")
CONVOLUTIONS = ("net.0.weight", "net.3.weight")
EPOCHS, BATCHES = 2, 6
OVERFLOWS = (0, 4, 5, 8)
BOUND = 0.02
pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")


class Classifies(pl.LightningModule):
    """Two convolutions under batch norms with next to no eps, in float64, and what it saw."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-30), nn.ReLU()),
            *(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-30)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
        ).double()
        self.options = options
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor | None:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, **self.options)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({name: q.detach().clone() for name, q in self.named_parameters()})


def make_data(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * BATCHES, 2, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images.to(dtype), torch.arange(4 * BATCHES) % 3), batch_size=4)


def make_history(steps: int = BATCHES, **provenance: Any) -> NormHistory:
    """Records at the start, and in the middle and at the end of each of two epochs of `steps`."""
    generator = torch.Generator().manual_seed(1)
    parameters = dict(Classifies().named_parameters())
    norms = {
        name: channel_norms(parameters[name]).float()
        * (0.6 + 0.8 * torch.rand(5, len(parameters[name]), generator=generator))
        for name in CONVOLUTIONS
    }
    clock = [0, steps // 2, steps, steps + steps // 2, 2 * steps]
    return NormHistory.from_arrays(
        {name: values.numpy() for name, values in norms.items()},
        clock,
        [0, 0, 0, 1, 1],
        provenance=provenance,
    )


def make_trainer(folder: Path, steering: Any, *others: Any, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": EPOCHS, "default_root_dir": folder, **options}
    return quiet_trainer(WeightNormTracker(steering=steering), *others, **settings)


def train_by_hand(
    rule: Any, clip: Callable[[Any], object] = lambda _: None, parts: int = 1
) -> Classifies:
    """The loop that a Trainer stands for."""
    module = Classifies()
    optimizer = module.configure_optimizers()
    handle = rule.attach(optimizer, module.named_parameters())
    batches = [batch for _ in range(EPOCHS) for batch in make_data()]
    for step in range(len(batches) // parts):
        optimizer.zero_grad()
        for batch in batches[parts * step : parts * (step + 1)]:
            (module.training_step(batch, 0) / parts).backward()  # type: ignore[operator]
        handle.measure()
        clip(module.parameters())
        optimizer.step()
    return module


def assert_close(one: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100, msg=name)


@pytest.fixture(params=RULES)
def rule_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Overflows(Classifies):
    """Leaves an infinite gradient at some batches, or leaves these batches out."""

    def __init__(self, *, leaves_out: bool, **options: Any) -> None:
        super().__init__(**options)
        self.net.float()
        self.leaves_out, self.batch = leaves_out, -1
        self.moments: dict[int, float] = {}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        self.batch += 1
        if self.leaves_out and self.batch in OVERFLOWS:
            return None
        return super().training_step(batch, index)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        handle = self.trainer.callbacks[0].handles[0]  # type: ignore[attr-defined]
        self.moments[self.batch] = handle.clock()["epoch"]

    def on_after_backward(self) -> None:
        if self.batch in OVERFLOWS:
            self.net[3].weight.grad[1, 0, 0, 0] = torch.inf


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steering_with_skipped_steps(rule_name: str, implementation: str, tmp_path: Path) -> None:
    """In 16-mixed an overflow costs the step and nothing else; the clock counts it."""
    modules = []
    for leaves_out in (False, True):
        module = Overflows(leaves_out=leaves_out, **IMPLEMENTATIONS[implementation])
        # In float32 this lowers the scale by nothing, so that half precision rounds alike.
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, backoff_factor=1 - 1e-10)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer = make_trainer(tmp_path, RULES[rule_name](make_history()), plugins=precision)
        trainer.fit(module, make_data(torch.float32))
        modules.append(module)
    attempts = {batch: batch / BATCHES for batch in range(EPOCHS * BATCHES)}
    assert modules[0].moments == pytest.approx(attempts)
    for batch, (one, other) in enumerate(zip(*(m.seen for m in modules), strict=True)):
        for name, values in one.items():
            assert torch.equal(values, other[name]), (batch, name)
        if batch in OVERFLOWS and batch:
            assert torch.equal(one[CONVOLUTIONS[0]], modules[0].seen[batch - 1][CONVOLUTIONS[0]])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_steering_with_gradient_clipping(rule_name: str, algorithm: str, tmp_path: Path) -> None:
    """The weights to steer are found before the gradients are clipped."""
    rule = RULES[rule_name](make_history())
    module = Classifies()
    trainer = make_trainer(
        tmp_path, rule, gradient_clip_val=BOUND, gradient_clip_algorithm=algorithm
    )
    trainer.fit(module, make_data())
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    assert_close(module, train_by_hand(rule, lambda parameters: clip(parameters, BOUND)))
    (handle,) = trainer.callbacks[0].handles  # type: ignore[attr-defined]
    assert len(handle.steered) == len(handle.weights)


def test_steering_with_accumulation(rule_name: str, tmp_path: Path) -> None:
    rule = RULES[rule_name](make_history(steps=BATCHES // 2))
    module = Classifies()
    make_trainer(tmp_path, rule, accumulate_grad_batches=2).fit(module, make_data())
    assert_close(module, train_by_hand(rule, parts=2))


class TwoOptimizers(Classifies):
    """Steps by hand, one optimizer after the other."""

    def __init__(self, second: Callable[[str], bool]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.second = second

    def configure_optimizers(self) -> Any:
        parts: tuple[list[Any], list[Any]] = ([], [])
        for name, parameter in self.named_parameters():
            parts[self.second(name)].append(parameter)
        return [torch.optim.SGD(part, lr=0.05, momentum=0.9) for part in parts]

    def training_step(self, batch: list[Tensor], index: int) -> None:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("second", ["net.3", "net.7"])
def test_steering_of_two_optimizers(rule_name: str, second: str, tmp_path: Path) -> None:
    """Each is steered where it has a convolution, or for some rules any matrix."""
    rule = RULES[rule_name](make_history())
    module = TwoOptimizers(lambda name: name.startswith(second))
    trainer = make_trainer(tmp_path, rule)
    trainer.fit(module, make_data())
    both = second == "net.3" or rule_name in ANY_MATRIX
    assert len(trainer.callbacks[0].handles) == 1 + both  # type: ignore[attr-defined]
    assert_close(module, train_by_hand(rule))


class Validates(Classifies):
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.net(batch[0])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_steering_with_weight_averaging(rule_name: str, tmp_path: Path) -> None:
    """Steered weights are averaged, the averages steer nothing, and a resume keeps both."""
    rule = RULES[rule_name](make_history())

    def fit(folder: str, start: Path | None = None) -> Classifies:
        module = Validates()
        others = [
            EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ]
        trainer = make_trainer(tmp_path / folder, rule, *others, enable_checkpointing=True)
        trainer.fit(module, make_data(), make_data(), ckpt_path=start)
        return module

    whole = fit("whole")
    for name, parameter in train_by_hand(rule).named_parameters():
        torch.testing.assert_close(whole.seen[-1][name], parameter.detach(), rtol=1e-9, atol=1e-11)
        mean = whole.seen[0][name]
        for seen in whole.seen[1:]:
            mean = 0.5 * mean + 0.5 * seen[name]
        torch.testing.assert_close(whole.get_parameter(name).detach(), mean)
    records = NormHistory.load(tmp_path / "whole").norms
    for name in CONVOLUTIONS:  # of the weights, not of their averages
        np.testing.assert_allclose(
            records[name][-1], channel_norms(whole.seen[-1][name]), rtol=1e-6
        )

    resumed = fit("resumed", start=tmp_path / "epoch=0.ckpt")
    assert len(resumed.seen) == BATCHES
    for name, parameter in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


@pytest.mark.parametrize("part", ["layers", "module"])
def test_steering_of_compiled_modules(rule_name: str, part: str, tmp_path: Path) -> None:
    """Under the names that they have in a recording of a module that is not compiled."""
    rule = RULES[rule_name](make_history())
    module: Any = Classifies()
    if part == "layers":
        module.net = torch.compile(module.net, backend="eager")
    compiled = torch.compile(module, backend="eager") if part == "module" else module
    make_trainer(tmp_path, rule).fit(compiled, make_data())
    assert list(NormHistory.load(tmp_path).norms) == [*CONVOLUTIONS, "net.7.weight"]
    assert_close(module, train_by_hand(rule))


def lose_channels(history: NormHistory) -> NormHistory:
    norms = {name: values[:, :3] for name, values in history.norms.items()}
    return NormHistory.from_arrays(norms, history.steps, history.epochs)


BAD_REFERENCES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of another shape": (
        lambda _: lose_channels(make_history()),
        "another model: net.0.weight has 3 output channels there and 4 here",
    ),
    "shorter": (lambda _: make_history().until(6), "covers 1 epochs, and the run has 2: record a"),
    "empty": (lambda _: make_history().until(-1), "covers 0 epochs, and the run has 2"),
    "of another seed": (lambda _: make_history(seed=-1), "with seed -1, .* set other_run=True to"),
    "of another optimizer": (
        lambda _: make_history(optimizers=[{"name": "AdamW", "lr": 0.05}]),
        "a run with AdamW, and this one has SGD, .* set other_run=True to follow it",
    ),
    "of more processes": (
        lambda _: make_history(world_size=8),
        "a run with world_size 8, and this one has 1; set other_run=True to follow it",
    ),
}


@pytest.mark.parametrize("rule_name", REFERENCED)
@pytest.mark.parametrize("reference", BAD_REFERENCES)
def test_steering_refuses_bad_references(rule_name: str, reference: str, tmp_path: Path) -> None:
    make, message = BAD_REFERENCES[reference]
    module = Classifies()
    trainer = make_trainer(tmp_path / "run", RULES[rule_name](make(tmp_path)))
    with pytest.raises(InputError, match=message) as caught:
        trainer.fit(module, make_data())
    assert "\n" not in str(caught.value)
    assert not module.seen


@pytest.mark.parametrize("rule_name", REFERENCED)
@pytest.mark.parametrize(
    "provenance", [{"seed": -1}, {"world_size": 8}, {"optimizers": [{"name": "AdamW"}]}]
)
def test_other_run_is_followed(rule_name: str, provenance: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    rule = RULES[rule_name](make_history(**provenance))
    trainer.callbacks[0] = WeightNormTracker(steering=rule, other_run=True)  # type: ignore[attr-defined]
    module = Classifies()
    trainer.fit(module, make_data())
    assert_close(module, train_by_hand(rule))


@pytest.mark.filterwarnings("ignore:DecayEquivalentLR skipped 6 steps .* by step 12")
def test_skipped_steps_warn_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """Sooner than at the 25th step."""

    class Spoiled(Classifies):
        def on_after_backward(self) -> None:
            self.net[0].weight.grad[1] = torch.nan

    trainer = make_trainer(tmp_path, DecayEquivalentLR(0.05))
    with pytest.warns(UserWarning, match="skipped 6 steps of channels of net.0.weight by step 6"):
        trainer.fit(Spoiled(), make_data())

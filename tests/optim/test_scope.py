"""Scope: the weights chosen by name and shape, then by scale invariance on their gradients."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmlightning import Hyperball, exempt_from_decay
from nmlightning.errors import InputError
from nmlightning.optim import (
    CautiousDecay,
    CorrectedDecay,
    DecayEquivalentLR,
    DecaySchedule,
    LRCorrection,
    NormSchedule,
    RadialProjection,
    SpectralCap,
    UnitNorm,
)
from nmlightning.optim.scope import CHANCE, TOLERANCE, share_limit
from nmlightning.optim.step_hooks import StepHookHandle
from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_layer_weights
from optim_rules import (
    CONVOLUTIONS,
    REFERENCED,
    RULES,
    SCALE_INVARIANT,
    MakeRule,
    find_loss,
    make_net,
    random_history,
    sgd,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")


class Mixed(nn.Module):
    """Convolutions, one of them transposed, and a parameter of three dimensions that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, 2, 8))
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
        self.head = nn.Linear(6, 3)


def record(net: nn.Module) -> NormHistory:
    weights = find_layer_weights(net)
    norms = {w.name: channel_norms(w.parameter, layout=w.layout)[None].numpy() for w in weights}
    return NormHistory.from_arrays(norms, [10], [0])


def steered(handle: Any) -> dict[str, ChannelLayout]:
    return {weight.name: weight.layout for weight in handle.weights}


@pytest.mark.parametrize("rule_name", SCALE_INVARIANT)
def test_model_gives_convolutions_and_layouts(make_rule: MakeRule) -> None:
    net = Mixed()
    for model in (net, torch.compile(net, backend="eager")):
        handle = make_rule(record(net)).attach(sgd(net), model)
        assert steered(handle) == {"conv.weight": ChannelLayout(), "up.weight": ChannelLayout(2)}


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_names_alone_are_compared_with_the_recording(make_rule: MakeRule) -> None:
    net = Mixed()
    history = record(net)
    with pytest.warns(UserWarning, match=r"recording has no pos, .* is not steered: exclude it"):
        handle = make_rule(history).attach(
            sgd(net), net.named_parameters(), {"up.weight": ChannelLayout(2)}
        )
    assert list(steered(handle)) == ["conv.weight", "up.weight"]
    with pytest.raises(InputError, match="from another model: it has no 'pos'"):
        make_rule(history, include=["pos"]).attach(sgd(net), net.named_parameters())
    other = NormHistory.from_arrays({"layer.weight": [[1.0]]}, [10], [0])
    with pytest.raises(InputError, match="from another model: it has no 'pos'"):
        make_rule(other).attach(sgd(net), net.named_parameters())
    with pytest.raises(InputError, match=r"from another model: it has no 'conv\.weight'"):
        make_rule(other).attach(sgd(net), net)


def test_pattern_passes_over_what_has_one_dimension(make_rule: MakeRule) -> None:
    net = Mixed()
    handle = make_rule(record(net), include=["*.weight"]).attach(sgd(net), net)
    assert list(steered(handle)) == ["conv.weight", "up.weight", "head.weight"]


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_transposed_convolution_without_layout_is_refused(make_rule: MakeRule) -> None:
    net = Mixed()
    message = (
        "up.weight has 6 output channels there and 4 here. If it is a transposed convolution, "
        r"give attach the model itself, which knows its channels."
    )
    with pytest.raises(InputError, match=message):
        make_rule(record(net), exclude=["pos"]).attach(sgd(net), net.named_parameters())


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (["norm.weight"], r"norm.weight cannot be steered: expected a .* of shape \(4,\)\. Excl"),
        ("norm.weight", r"include is a list, got the string 'norm.weight'"),
        ([3], r"include is a list of strings, got \[3\]"),
    ],
)
def test_bad_include_is_refused(make_rule: MakeRule, include: Any, message: str) -> None:
    net = Mixed()
    with pytest.raises(InputError, match=message):
        make_rule(record(net), include=include).attach(sgd(net), net)


@pytest.mark.parametrize(
    "given", [lambda net: net.parameters(), lambda net: 3, lambda net: net.state_dict()]
)
def test_attach_needs_a_model(make_rule: MakeRule, given: Callable[[nn.Module], Any]) -> None:
    net = Mixed()
    with pytest.raises(InputError, match=r"attach takes the model or its named_parameters\(\), go"):
        make_rule(record(net)).attach(sgd(net), given(net))


def step_once(rule: Any, weight_decay: float = 0.0, steps: int = 1) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=weight_decay)
    rule.attach(optimizer, net)
    train(net, optimizer, steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LRCorrection(None), "reference is a NormHistory or a path, got None"),
        (lambda: NormSchedule(3), "reference is a NormHistory or a path, got 3"),
        (lambda: LRCorrection("a", max_factor="1"), "max_factor is a positive number, or None"),
        (lambda: LRCorrection("a", max_rotation=True), "max_rotation is a positive number, or N"),
        (lambda: NormSchedule("a", max_rotation=0.0), "a positive number, or None, got 0.0"),
        (lambda: NormSchedule("a", math.nan), "base_lr is a positive number, or None, got nan"),
        (lambda: DecayEquivalentLR(math.inf), "weight_decay must be 0 or more, got inf"),
        (lambda: DecayEquivalentLR(math.nan), "weight_decay must be 0 or more, got nan"),
        (lambda: RadialProjection(delta=0.0), "delta must be positive, got 0.0"),
        (lambda: RadialProjection(delta=math.nan), "delta must be positive, got nan"),
        (lambda: RadialProjection(delta="1"), "delta must be positive, got '1'"),  # type: ignore[arg-type]
        (lambda: CorrectedDecay(-1.0), "weight_decay must be 0 or more, got -1.0"),
        (lambda: CorrectedDecay(0.1, max_lr=0.0), "max_lr is a positive number, or None, got 0.0"),
        (lambda: CorrectedDecay(0.1, correct="some"), "correct is 'scale_invariant' or 'all', got"),
        (lambda: CautiousDecay("x"), "weight_decay must be 0 or more, got 'x'"),
        (lambda: DecaySchedule(0.5), "schedule is a function of the step, got 0.5"),
        (
            lambda: step_once(CautiousDecay(lambda t: t - 1)),
            "CautiousDecay: weight_decay is .* -1.0",
        ),
        (
            lambda: step_once(DecaySchedule(lambda t: 1 - 2 * t), 0.1, 2),
            "DecaySchedule: schedule is a function of the step that gives 0 .*, got -1.0 at step 1",
        ),
        (
            lambda: step_once(DecaySchedule(lambda _: None), 0.1),
            "DecaySchedule: .* a number; step 0",
        ),  # type: ignore[arg-type, return-value]
        (lambda: step_once(DecaySchedule(lambda: 1.0), 0.1), "a number; step 0: .*takes 0 posit"),  # type: ignore[arg-type, misc]
        (lambda: step_once(DecaySchedule(abs)), "and it is 0 in those of all weights: set weigh"),
        (lambda: step_once(CautiousDecay(0.1), 0.1), "has weight decay 0.1 in its optimizer"),
        (lambda: SpectralCap(0.0), r"sigma_max must be a positive number, got 0\.0"),
        (lambda: SpectralCap(None), "sigma_max must be a positive number, got None"),  # type: ignore[arg-type]
        (lambda: SpectralCap(1.0, granularity="row"), "granularity is 'auto' or"),  # type: ignore[arg-type]
        (lambda: UnitNorm(2), "dim is 0 or 1, got 2"),
        (lambda: UnitNorm({"*": -1}), "dim is 0 or 1, got -1"),
        (lambda: UnitNorm(norm="l1"), "norm is 'l2' or 'rms', got 'l1'"),  # type: ignore[arg-type]
        (
            lambda: step_once(UnitNorm({"c*": 0})),
            r'dim has no pattern for head.weight: add "\*" for all others',
        ),
        (
            lambda: step_once(UnitNorm({"z": 0, "*": 1})),
            "The pattern 'z' matches no parameter that no",
        ),
        (lambda: step_once(UnitNorm({"*": 1, "c*": 0})), r"The pattern 'c\*' matches no parameter"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [nn.LSTM(4, 5), nn.Embedding(4, 5)])
def test_model_without_layers_has_matrices(model: nn.Module) -> None:
    optimizer = sgd(model)
    matrices = [name for name, q in model.named_parameters() if q.dim() > 1]
    assert Hyperball().attach(optimizer, model).steered == matrices
    groups = exempt_from_decay(model.parameters(), model, Hyperball())
    assert sum(len(g["params"]) for g in groups if g.get("weight_decay") == 0) == len(matrices)
    with pytest.raises(
        InputError, match="weight to steer: by default these are the convolutions i"
    ):
        DecayEquivalentLR(0.01).attach(optimizer, model)
    with pytest.raises(InputError, match="which has no shape yet; run a batch through the model"):
        Hyperball().attach(optimizer, nn.Sequential(nn.LazyLinear(3)))


def test_attach_takes_an_iterator_of_names(make_rule: MakeRule) -> None:
    net = Mixed()
    pairs: list[tuple[str, Tensor]] = [("conv.weight", net.conv.weight)]
    handle = make_rule(record(net)).attach(sgd(net), iter(pairs))
    assert list(steered(handle)) == ["conv.weight"]


Forward = Callable[[Tensor], Tensor]


def attach(
    seed: int, after: Forward, channels: int = 1
) -> tuple[StepHookHandle, Callable[[], None]]:
    """Return the rule at work on a 1×1 convolution, and what takes a step."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(32, channels, 1, bias=False)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1e-3)
    handle = DecayEquivalentLR(0.01).attach(optimizer, conv.named_parameters())

    def step() -> None:
        optimizer.zero_grad()
        x, target = torch.randn(4, 32, 3, 3), torch.rand(4, channels, 3, 3)
        (after(conv(x)) - target).square().mean().backward()
        optimizer.step()

    return handle, step


def normalise(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def test_scope_of_one_channel_is_not_chance() -> None:
    """One gradient of one channel is across the weight within a tenth in 8 % of all cases."""
    steered = []
    for seed in range(300):
        handle, step = attach(seed, torch.sigmoid)
        for _ in range(6):
            step()
            steered.append(bool(handle.factors()))
        assert handle.measured
        assert not handle.steered
    assert not any(steered)


@pytest.mark.parametrize("channels", [1, 2, 32])
def test_scale_invariant_weight_is_steered_at_once(channels: int) -> None:
    for seed in range(20):
        handle, step = attach(seed, normalise, channels)
        step()
        assert handle.measured
        assert bool(handle.factors())
        assert handle.reasons()["weight"].startswith("steered: scale-invariant (radial share")


def across(conv: nn.Parameter, share: float) -> Tensor:
    """Return a gradient of a given radial share."""
    w = conv.detach().flatten(1)
    other = torch.randn_like(w)
    other -= (other * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
    cosine = share / math.sqrt(w.shape[1])
    unit = w / w.norm(dim=1, keepdim=True) * cosine
    return (unit + other / other.norm(dim=1, keepdim=True) * math.sqrt(1 - cosine**2)).view_as(conv)


def test_scope_waits_for_more_gradients() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 32, 1, 1))

    def start() -> tuple[StepHookHandle, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        return DecayEquivalentLR(0.01).attach(optimizer, [("weight", weight)]), optimizer

    handle, optimizer = start()
    weight.grad = across(weight, 0.05)
    optimizer.step()
    assert not handle.measured
    assert not handle.factors()
    reason = handle.reasons()["weight"]
    assert (
        reason
        == "not steered so far: that may be chance (radial share 5.0e-02 in 2 channels' gradients)"
    )
    optimizer.step()

    resumed, optimizer = start()
    resumed.load_state_dict(handle.state_dict())
    assert not resumed.measured
    weight.grad = across(weight, 0.05)
    optimizer.step()
    assert resumed.measured
    assert bool(resumed.factors())


def test_scope_counts_each_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured before it is clipped, and again in the step; or in a step that is not taken."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1, 32, 1, 1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    handle = DecayEquivalentLR(0.01).attach(optimizer, [("weight", weight)])
    for count in (1, 2):
        weight.grad = across(weight, 0.9)
        handle.measure()  # of a step that a GradScaler leaves out
        weight.grad = across(weight, 0.09)
        handle.measure()
        weight.grad = weight.grad.clamp(-1e-3, 1e-3)
        optimizer.step()
        assert handle.scope.samples["weight"] == count
        assert handle.scope.shares["weight"] == pytest.approx(0.09, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_share_limit_has_its_probability(samples: int) -> None:
    """By the chi-squared distribution of a sum of squared normal cosines."""
    half = torch.tensor(samples / 2, dtype=torch.float64)
    chance = torch.special.gammainc(half, half * share_limit(samples) ** 2)
    assert 0.5 * CHANCE < chance <= CHANCE
    assert share_limit(samples) < share_limit(samples + 1) <= share_limit(6) == TOLERANCE


class EditsGradients(torch.optim.SGD):
    """Plain SGD that leaves something else in the gradients, as schedule-free and Ranger do."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.copy_(parameter.detach())  # points along the weight
        return loss


@pytest.mark.parametrize("rule_name", [*RULES])
def test_gradients_are_measured_before_the_step(make_rule: MakeRule) -> None:
    """They come into being within it where there is a closure, after the weights were kept."""

    def compute(net: nn.Module, step: int) -> Tensor:
        net.zero_grad()
        loss = find_loss(net, step)
        loss.backward()
        return loss

    ends = []
    for optimizer_class, with_closure in product((torch.optim.SGD, EditsGradients), (False, True)):
        net = make_net()
        optimizer = optimizer_class(net.parameters(), lr=0.02)
        handle = make_rule(random_history(net)).attach(optimizer, net)
        for step in range(3):
            if with_closure:
                assert optimizer.step(partial(compute, net, step)) > 0, "the loss is returned"
            else:
                compute(net, step)
                optimizer.step()
        assert set(CONVOLUTIONS) <= set(handle.steered)
        assert handle.steps == 3
        ends.append([net.get_parameter(name) for name in CONVOLUTIONS])
    for plain, *others in zip(*ends, strict=True):
        assert all(torch.equal(other, plain) for other in others)


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "pytorch_optimizer.Ranger"])
def test_optimizers_that_edit_gradients_are_steered(name: str) -> None:
    package, _, optimizer_class = name.partition(".")
    make = getattr(pytest.importorskip(package), optimizer_class)
    net = make_net()
    optimizer = make(net.parameters(), lr=1e-3, weight_decay=0.0)
    averages = hasattr(optimizer, "train")
    line = r"LRCorrection steers the weights that AdamWScheduleFree trains; .* read norms after"
    with pytest.warns(UserWarning, match=line) if averages else nullcontext():
        handle = LRCorrection(random_history(net), power=1).attach(optimizer, net)
    if averages:
        optimizer.train()
    train(net, optimizer, 2)
    assert max(handle.scope.shares.values()) < 1e-12, "in float64"
    assert handle.steered == list(CONVOLUTIONS)

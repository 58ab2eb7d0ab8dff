"""Every rule under clipping, accumulation and skipped steps, against a port; and by closures."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import optim_rules
from nmlightning.errors import InputError
from nmlightning.optim import LRCorrection, norm_bounds
from nmlightning.optim.parameters import NORM
from nmlightning.optim.step_hooks import StepHookHandle
from nmlightning.weights.history import NormHistory
from optim_rules import (
    ANY_MATRIX,
    CONVOLUTIONS,
    IMPLEMENTATIONS,
    LBFGS_REFUSALS,
    REFERENCED,
    RULES,
    MakeRule,
    find_loss,
    make_net,
    random_history,
    sgd,
)

Array = NDArray[np.float64]
STEPS, EPOCH = 12, 3
RATE, MOMENTUM, DECAY = 0.02, 0.9, 0.01  # those of the net's optimizer, and of the row "decay"
OVERFLOWS = (0, 4, 5, 10)
BOUND, BOUNDS = 0.02, (1.1, 0.05)  # of gradients; of the rule "bounded"
KINDS = {name: RULES[name]("a").acts_on for name in (*ANY_MATRIX, "decay", "stable")}
CONDITIONS = ["norm", "value", "accumulation", "skipped", *IMPLEMENTATIONS]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda q, lr: torch.optim.SGD(q, lr, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
}
OTHER_RULES: dict[str, MakeRule] = {
    "paper layer": lambda history: LRCorrection(history, mode="paper", granularity="layer"),
    "bounded": lambda history: LRCorrection(
        history, max_factor=BOUNDS[0], max_rotation=BOUNDS[1], align="official"
    ),
}
DECAYING = {"AdamW": partial(torch.optim.AdamW, weight_decay=3.0)}  # of which a step takes 6 %
pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")


@pytest.fixture(autouse=True)
def _exact_power_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_bounds, "RISE", 0.0)
    monkeypatch.setattr(norm_bounds, "MOST_ITERATIONS", 5000)


@pytest.fixture
def history() -> NormHistory:
    return random_history(make_net(), 5, EPOCH)


def find_rate(step: int) -> float:
    return RATE if step < STEPS // 2 else 0.3 * RATE


class Port:
    """SGD with momentum under a rule, channel by channel, from the formulas in the papers."""

    def __init__(self, rule: str, net: nn.Module, history: NormHistory, nesterov: bool) -> None:
        self.rule, self.history, self.nesterov = rule, history, nesterov
        self.weights = {n: q.detach().numpy() for n, q in net.named_parameters()}
        self.velocities = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.radii = {n: np.linalg.norm(w) for n, w in self.weights.items()}
        self.initial = {n: norms_of(self.weights[n]) for n in CONVOLUTIONS}
        self.decayed = {n: self.weights[n].copy() for n in CONVOLUTIONS}

    def step(self, gradients: Mapping[str, Array], step: int) -> None:
        rate = find_rate(step)
        for name, weight in self.weights.items():
            velocity, grad = self.velocities[name], gradients[name]
            if name in CONVOLUTIONS and self.rule == "decay":
                self.decay(name, weight, velocity, rate, grad)
                continue
            velocity *= MOMENTUM
            velocity += grad
            direction = grad + MOMENTUM * velocity if self.nesterov else velocity
            if weight.ndim > 1 and self.rule in ANY_MATRIX:
                weight[:] = self.move(name, weight, rate, -rate * direction, grad)
            elif name in CONVOLUTIONS:
                self.follow(name, -rate * direction, rate, self.find_recorded(name, step))
            else:
                weight -= rate * direction

    def move(self, name: str, weight: Array, rate: float, delta: Array, grad: Array) -> Array:
        """Return a matrix after the step, of rules that steer all of them."""
        if self.rule == "hyperball":
            return self.turn(name, weight, rate, -delta)
        if self.rule == "projection":
            return weight - find_tangent(weight, grad, -delta)
        if KINDS[self.rule] == NORM:
            return self.bound(weight + delta)
        decay = rate * optim_rules.DECAY * weight
        if self.rule == "cautious":
            return weight + delta - np.where(-delta * weight >= 0, decay, 0.0)
        return weight + delta - decay * (rate / RATE if name in CONVOLUTIONS else 1.0)

    def bound(self, weight: Array) -> Array:
        """Return a matrix after the rules that hold nothing of what was before."""
        rows = weight.reshape(len(weight), -1)
        if self.rule == "cap":
            return weight * min(1.0, optim_rules.SIGMA / np.linalg.svd(rows)[1][0])
        if self.rule == "rows":
            return weight / np.linalg.norm(rows, axis=1).reshape(-1, *[1] * (weight.ndim - 1))
        columns = rows / np.linalg.norm(rows, axis=0) * math.sqrt(len(rows))
        return columns.reshape(weight.shape)

    def turn(self, name: str, weight: Array, rate: float, direction: Array) -> Array:
        moved = weight - rate * self.radii[name] * direction / (np.linalg.norm(direction) or 1)
        return self.radii[name] * moved / np.linalg.norm(moved)

    def decay(self, name: str, weight: Array, velocity: Array, rate: float, grad: Array) -> None:
        """SGD with weight decay, of which the net sees the directions at their first norms."""
        channels = (self.decayed[name], weight, velocity, grad, self.initial[name])
        for full, w, v, g, initial in zip(*channels, strict=True):
            v *= MOMENTUM
            v += g * (initial / np.linalg.norm(full)) + DECAY * full
            full -= rate * v
            w[:] = full * (initial / np.linalg.norm(full))

    def follow(self, name: str, deltas: Array, rate: float, norms: Array) -> None:
        """Scale the step by the recorded norms, and hold those that the rule holds."""
        weight, velocity = self.weights[name], self.velocities[name]
        own = norms_of(weight) if self.is_literal else self.initial[name]
        factors = own**2 / norms**2
        targets = self.initial[name]
        if self.rule.endswith("layer"):
            factors[:] = (own**2).sum() / (norms**2).sum()
        if self.rule == "bounded":
            factors = np.minimum(factors, BOUNDS[0])
        if self.rule == "schedule":
            factors[:], targets = RATE / rate, norms * math.sqrt(RATE / rate)
        for w, v, delta, target in zip(
            weight, velocity, deltas * factors[:, None, None, None], targets, strict=True
        ):
            if self.is_literal:
                w += delta
                continue
            turn = BOUNDS[1] if self.rule == "bounded" else 0.2
            w += delta * min(1.0, turn * np.linalg.norm(w) / np.linalg.norm(delta))
            v *= np.linalg.norm(w) / target
            w *= target / np.linalg.norm(w)

    @property
    def is_literal(self) -> bool:
        return self.rule.startswith("paper")

    def find_recorded(self, name: str, step: int) -> Array:
        rows = self.history.norms[name].astype(np.float64)
        if self.is_literal or self.rule == "bounded":
            return rows[step // EPOCH]
        return np.array([np.interp(step, self.history.steps, channel) for channel in rows.T])


def norms_of(weight: Array) -> Array:
    return np.array([np.linalg.norm(channel) for channel in weight])


def find_tangent(weight: Array, grad: Array, velocity: Array) -> Array:
    """A step without its part along the weight, as SGDP has it at its δ of 0.1."""
    for rows in (len(weight), 1):
        w, g, v = (x.reshape(rows, -1) for x in (weight, grad, velocity))
        units = w / np.linalg.norm(w, axis=1, keepdims=True)
        cosines = (units * g).sum(1) / np.linalg.norm(g, axis=1)
        if np.abs(cosines).max() < 0.1 / math.sqrt(w.shape[1]):
            along = (units * v).sum(1, keepdims=True)
            return (v - along * units).reshape(velocity.shape)
    return velocity


def train_port(port: Port, net: nn.Module, condition: str) -> None:
    parts = 2 if condition == "accumulation" else 1
    names, parameters = zip(*net.named_parameters(), strict=True)
    for step in range(STEPS):
        if condition == "skipped" and step in OVERFLOWS:
            continue
        loss = sum(find_loss(net, parts * step + part) for part in range(parts))
        gradients = [g.numpy() for g in torch.autograd.grad(loss, parameters)]
        if condition == "norm":
            norm = math.sqrt(sum((g**2).sum() for g in gradients))
            gradients = [g * min(1.0, BOUND / (norm + 1e-6)) for g in gradients]  # as torch does
        if condition == "value":
            gradients = [np.clip(g, -BOUND, BOUND) for g in gradients]
        port.step(dict(zip(names, gradients, strict=True)), step)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, handle: StepHookHandle, condition: str
) -> None:
    """Train as users do."""
    parts = 2 if condition == "accumulation" else 1
    scaler = torch.amp.GradScaler("cpu", enabled=condition == "skipped")
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = find_rate(step)
        handle.clock = lambda step=step: {"step": step}
        optimizer.zero_grad()
        for part in range(parts):
            scaler.scale(find_loss(net, parts * step + part)).backward()
        handle.measure()
        if condition == "norm":
            nn.utils.clip_grad_norm_(net.parameters(), BOUND)
        if condition == "value":
            nn.utils.clip_grad_value_(net.parameters(), BOUND)
        if condition == "left out" and step in OVERFLOWS:
            continue
        if condition == "skipped" and step in OVERFLOWS:
            net.conv2.weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(
    ("rule_name", "condition"),
    [*product(RULES, CONDITIONS), *product((*REFERENCED, *OTHER_RULES), ["nesterov"])],
)
def test_rule_matches_numpy_port(history: NormHistory, rule_name: str, condition: str) -> None:
    net, other = make_net(), make_net()
    nesterov = condition == "nesterov"
    optimizer = sgd(net, nesterov=nesterov, **IMPLEMENTATIONS.get(condition, {}))
    rule = (RULES | OTHER_RULES)[rule_name](history)
    handle = rule.attach(optimizer, net.named_parameters())
    train(net, optimizer, handle, condition)
    train_port(Port(rule_name, other, history, nesterov), other, condition)
    assert len(handle.steered) == len(handle.weights)
    for (name, one), two in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=name)


PAIRS = list(permutations(ANY_MATRIX, 2))


@pytest.mark.parametrize(
    ("rule_names", "family"),
    [
        *product([(name,) for name in ANY_MATRIX], OPTIMIZERS),
        *product([(name,) for name in ANY_MATRIX if RULES[name](None).decays], DECAYING),
        *((pair, "Adam") for pair in PAIRS if KINDS[pair[0]] < KINDS[pair[1]]),
    ],
)
def test_rules_of_matrices_by_definition_around_any_optimizer(
    history: NormHistory, rule_names: tuple[str, ...], family: str
) -> None:
    """A free optimizer that is shown the same gradients at the same weights gives the step.

    Of two rules the first one acts first.
    """
    net, shown = make_net(), make_net()
    make = (OPTIMIZERS | DECAYING)[family]
    optimizer, free = (make(n.parameters(), lr=RATE) for n in (net, shown))
    for name in rule_names:
        RULES[name](None).attach(optimizer, net.named_parameters())
    port = Port(rule_names[-1], make_net(), history, nesterov=False)

    def follow(_: int) -> None:
        for (name, q), other in zip(net.named_parameters(), shown.parameters(), strict=True):
            other.data, other.grad = torch.tensor(port.weights[name]), q.grad
        free.step()
        for (name, q), other in zip(net.named_parameters(), shown.parameters(), strict=True):
            weight = port.weights[name]
            delta = other.detach().numpy() - weight
            for port.rule in rule_names if q.dim() > 1 else ():
                delta = port.move(name, weight, RATE, delta, q.grad.numpy()) - weight
            weight += delta
            np.testing.assert_allclose(q.detach(), weight, rtol=1e-9, atol=1e-10)

    optim_rules.train(net, optimizer, 50, each=follow)


@pytest.mark.parametrize(
    "pair", [("decay", "stable"), *(p for p in PAIRS if KINDS[p[0]] >= KINDS[p[1]])]
)
def test_rule_that_would_undo_another_is_refused(
    history: NormHistory, pair: tuple[str, str]
) -> None:
    net = make_net()
    optimizer, (first, second) = sgd(net), (RULES[name](history) for name in pair)
    handle = first.attach(optimizer, net)
    names = type(first).__name__, type(second).__name__
    way_out = "exclude the weight from it"
    if KINDS[pair[0]] > KINDS[pair[1]]:
        way_out = f"attach it after {names[1]}, for it acts on the "
    message = f"conv1.weight is steered by {names[0]} already: remove that, or {way_out}"
    with pytest.raises(InputError, match=message):
        second.attach(optimizer, net)
    handle.remove()
    second.attach(optimizer, net)


def find_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = [value for q in net.parameters() for value in optimizer.state[q].values()]
    return [*net.parameters(), *(value.clone() for value in kept if isinstance(value, Tensor))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["SGD", "AdamW"])
def test_skipped_steps_change_nothing(
    history: NormHistory, make_rule: MakeRule, rule_name: str, family: str, implementation: str
) -> None:
    """A fused optimizer is called at an overflow and takes no step; the others are not called."""
    if rule_name == "decay" and family == "AdamW":
        pytest.skip("DecayEquivalentLR is for SGD only")
    options = {"SGD": {"momentum": MOMENTUM}, "AdamW": {"weight_decay": 0.0}}[family]
    results = []
    for condition in ("skipped", "left out"):
        net = make_net()
        optimizer = getattr(torch.optim, family)(
            net.parameters(), lr=RATE, **options, **IMPLEMENTATIONS[implementation]
        )
        handle = make_rule(history).attach(optimizer, net.named_parameters())
        train(net, optimizer, handle, condition)
        called = condition == "skipped" and implementation == "fused"
        assert handle.steps == (STEPS if called else STEPS - len(OVERFLOWS))
        assert handle.skipped == 0
        state = handle.state_dict()
        results.append([*find_state(net, optimizer), state["scope"], state["weights"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_lbfgs_is_refused(history: NormHistory, make_rule: MakeRule, rule_name: str) -> None:
    net = make_net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=3)
    with pytest.raises(InputError, match=LBFGS_REFUSALS[rule_name]):
        make_rule(history).attach(optimizer, net.named_parameters())

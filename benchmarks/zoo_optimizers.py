"""Trains under each rule with every optimizer of public packages, and checks what it promises.

    python benchmarks/zoo_optimizers.py [--rows zoo_optimizers.jsonl] [--only 'timm/lamb*']
    python benchmarks/zoo_optimizers.py --write docs/compatibility.md    # the tables

A line of the file of rows is an optimizer, called in one way; what is there is not tried again.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import accelerate
import heavyball
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
import torch.nn.functional as F
import torchao.optim
import transformers.optimization
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.optim import SGD, Optimizer
from zoo import Row, first_words, sweep
from zoo_tables import write_optimizers

from nmlightning import NormHistory, channel_norms
from nmlightning.errors import InputError
from nmlightning.optim import (
    CautiousDecay,
    CorrectedDecay,
    DecayEquivalentLR,
    Hyperball,
    LRCorrection,
    NormSchedule,
    RadialProjection,
    SpectralCap,
    StepRule,
    UnitNorm,
)
from nmlightning.optim.families import optimizers_in

STEPS, LR = 12, 0.01
TOLERANCE = 1e-3
ROUNDED = 1e-4  # steps so short are rounded to more than that
RECORDED = 0.9  # times the first norms
DECAY, SIGMA = 1.0, 0.5
OF_POWER_ITERATION = 0.02

Make = Callable[[nn.Module], Any]
MakeRule = Callable[[NormHistory, tuple[str, ...]], StepRule]
RULES: Mapping[str, MakeRule] = {
    "Hyperball": lambda _, include: Hyperball(include=include),
    "RadialProjection": lambda _, include: RadialProjection(include=include),
    "LRCorrection": lambda h, include: LRCorrection(h, power=2, include=include),
    'LRCorrection(mode="paper")': lambda h, include: LRCorrection(
        h, mode="paper", power=2, include=include
    ),
    "NormSchedule": lambda h, include: NormSchedule(h, power=2, include=include),
    "DecayEquivalentLR": lambda _, include: DecayEquivalentLR(0.01, include=include),
    "CorrectedDecay": lambda _, include: CorrectedDecay(DECAY, include=include),
    "CautiousDecay": lambda _, include: CautiousDecay(DECAY, include=include),
    "SpectralCap": lambda _, include: SpectralCap(SIGMA, include=include),
    "UnitNorm": lambda _, include: UnitNorm(include=include),
}


class Net(nn.Module):
    """Three layers under batch norms, two of them convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12)
        self.linear, self.norm3 = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, eps=1e-12)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))
        return self.head(F.silu(self.norm3(self.linear(x.mean((2, 3))))))


# Those that ask for groups by `use_muon`.
BY_DIMS = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")


def build(cls: Any, net: nn.Module, **options: Any) -> Any:
    """Return an optimizer of a net, without weight decay, given what its class asks for."""
    weights = list(net.parameters())
    if cls is torch.optim.Muon:
        weights = [q for q in weights if q.dim() == 2]
    given = {
        "params": weights, "model": net, "num_data": 16, "num_iterations": 100,
        "lr": LR, "weight_decay": 0.0,
    } | options  # fmt: skip
    parameters = inspect.signature(cls).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()) and "lr" not in parameters:
        given = {key: given[key] for key in ("params", "lr", *options) if key in given}
    else:
        given = {key: value for key, value in given.items() if key in parameters}
    return cls(**given)


def classes_in(module: Any) -> dict[str, Make]:
    """Return the optimizers that a module defines or shows."""
    found = {name: cls for name, cls in vars(module).items() if inspect.isclass(cls)}
    return {
        name: partial(build, cls)
        for name, cls in found.items()
        if callable(getattr(cls, "step", None))
        and cls is not Optimizer
        and not name.endswith(("Base", "Scheduler", "LR"))
    }


def sgd(net: nn.Module) -> SGD:
    return SGD(net.parameters(), lr=LR, momentum=0.9)


def by_dims(net: nn.Module) -> list[list[nn.Parameter]]:
    return [[q for q in net.parameters() if (q.dim() > 1) is many] for many in (True, False)]


def list_optimizers() -> dict[str, dict[str, Make]]:
    """Return how to make each optimizer of each package."""
    po, hb = pytorch_optimizer, heavyball

    def around(cls: Any) -> Make:
        return lambda net: cls(sgd(net))

    def sharpness_aware(cls: Any) -> Make:
        return lambda net: cls(net.parameters(), SGD, lr=LR)

    def in_two_groups(cls: Any) -> Make:
        return lambda net: cls(
            [{"params": qs, "use_muon": i == 0} for i, qs in enumerate(by_dims(net))], lr=LR
        )

    def of_timm(name: str) -> Make:
        return lambda net: timm.optim.create_optimizer_v2(net, name, LR, weight_decay=0.0)

    wrappers = (po.Lookahead, po.Magma, po.OrthoGrad, po.PCGrad, po.ScheduleFreeWrapper, po.TRAC,
                po.SafeFP16Optimizer)  # fmt: skip
    return {
        "torch": classes_in(torch.optim)
        | {
            "ZeroRedundancyOptimizer": sharpness_aware(ZeroRedundancyOptimizer),
            "PostLocalSGDOptimizer": lambda net: PostLocalSGDOptimizer(
                sgd(net), PeriodicModelAverager(period=2)
            ),
        },
        "pytorch_optimizer": {
            name: partial(build, po.load_optimizer(name))
            for name in po.get_supported_optimizers()
            if name != "magma"
        }
        | {name: in_two_groups(po.load_optimizer(name)) for name in BY_DIMS}
        | {cls.__name__: around(cls) for cls in wrappers}
        | {cls.__name__: sharpness_aware(cls) for cls in (po.SAM, po.LookSAM, po.FriendlySAM)}
        | {"WSAM": lambda net: po.WSAM(net, net.parameters(), SGD, lr=LR)},
        "timm": {name: of_timm(name) for name in timm.optim.list_optimizers()}
        | {"Lookahead": around(timm.optim.Lookahead)},
        "heavyball": classes_in(heavyball)
        | {
            "SAMWrapper": lambda net: hb.SAMWrapper(net.parameters(), hb.SGD),
            "SplitOpt": lambda net: hb.SplitOpt(
                {"params": qs, "optimizer": cls}
                for qs, cls in zip(by_dims(net), (hb.Muon, hb.AdamW), strict=True)
            ),
        },
        "torchao": classes_in(torchao.optim),
        "schedulefree": classes_in(schedulefree)
        | {
            cls.__name__: around(cls)
            for cls in (schedulefree.ScheduleFreeWrapper, schedulefree.ScheduleFreeWrapperReference)
        },
        "transformers": {
            "Adafactor": partial(build, transformers.optimization.Adafactor, relative_step=False)
        },
        "accelerate": {
            "AcceleratedOptimizer": lambda net: accelerate.Accelerator(cpu=True).prepare(sgd(net))
        },
    }


def draw(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 2, 8, 8, generator=generator)
    return x, torch.randint(4, (16,), generator=generator)


WAYS = ("two steps", "plain", "closure", "second derivatives")


def take_step(net: nn.Module, optimizer: Any, way: str, step: int) -> None:
    x, target = draw(step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        if hasattr(optimizer, "update_main_grads"):
            optimizer.backward(loss)  # it scales the loss
        else:
            loss.backward(create_graph=way == "second derivatives")
        return loss

    with torch.enable_grad():
        closure()
    if way == "two steps":
        optimizer.first_step()
        closure()
        optimizer.second_step()
        if hasattr(optimizer, "third_step"):
            closure()
            optimizer.third_step()
    elif way == "closure":
        optimizer.step(closure)
    else:
        optimizer.step()


def steered_weights(optimizer: Any) -> tuple[str, ...]:
    """Return the names to include: none, for those by default, but where it has no convolution."""
    return ("linear.weight",) if isinstance(optimizer, torch.optim.Muon) else ()


def train(make: Make, way: str, rule: str | None = None) -> tuple[list[dict[str, Tensor]], Any]:
    """Return the weights at first and after each step, and the handle of the rule."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)
    with suppress(AttributeError):
        optimizer.train()  # schedule-free
    named = {name: q for name, q in net.named_parameters() if q.dim() > 1}
    handle = None
    if rule is not None:
        norms = {n: channel_norms(q.detach()).mul(RECORDED).expand(2, -1) for n, q in named.items()}
        history = NormHistory.from_arrays({n: x.numpy() for n, x in norms.items()}, [0, 99], [0, 0])
        handle = RULES[rule](history, steered_weights(optimizer)).attach(optimizer, net)
    weights = [{name: q.detach().clone() for name, q in named.items()}]
    for step in range(STEPS):
        take_step(net, optimizer, way, step)
        if handle is not None and step == 0:  # some optimizers schedule their rate themselves
            handle.first_rates = {w.name: w.group.get("lr") for w in handle.weights}
        weights.append({name: q.detach().clone() for name, q in named.items()})
    return weights, handle


def find_fault(rule: str, plain: list[Any], steered: list[Any], handle: Any) -> str | None:
    """Return in words what is not as the rule promises."""
    if handle.steps != STEPS:
        return f"{handle.steps} of {STEPS} steps seen"
    left = {n: why for n, why in handle.reasons().items() if n not in handle.steered}
    if left:
        return f"{len(left)} weights left: {next(iter(left.values()))}"
    kept = handle.state_dict()["weights"]
    groups = {weight.name: weight.group for weight in handle.weights}
    for name in set(handle.steered) - {"head.weight"}:  # the loss feels its norm
        first, one, last, end = plain[0][name], plain[1][name], steered[-2][name], steered[-1][name]
        norms, length = channel_norms(end), channel_norms(end - last).clamp(min=ROUNDED)
        usual = channel_norms(plain[-1][name] - plain[-2][name]) / channel_norms(plain[-1][name])
        if "paper" not in rule and end.equal(last) and usual.max() > ROUNDED:
            return f"{name} does not move"
        if "paper" in rule:
            step = (one - first) / RECORDED**2
            error = (steered[1][name] - first - step).norm() / step.norm().clamp(min=ROUNDED)
        elif rule in ("CorrectedDecay", "CautiousDecay"):
            decayed = first * ((one - first) * first <= 0) if rule == "CautiousDecay" else first
            decay = handle.first_rates[name] * DECAY * decayed
            error = (steered[1][name] - one + decay).norm() / decay.norm().clamp(min=ROUNDED)
        elif rule == "SpectralCap":
            sigma = torch.linalg.matrix_norm(end.flatten(1), 2)
            error = (sigma / SIGMA - 1).clamp(min=0) - OF_POWER_ITERATION
        elif rule == "UnitNorm":
            error = (norms - 1).abs().max()
        elif rule == "RadialProjection":
            error = ((last * (end - last)).flatten(1).sum(1) / norms / length).abs().max()
        elif rule == "Hyperball":
            error = (end.norm() / first.norm() - 1).abs()
        else:
            base_lr = kept[name].get("base_lr")  # of NormSchedule; its optimizer may change it
            factor = RECORDED * (base_lr / groups[name]["lr"]) ** 0.5 if base_lr else 1
            error = (norms / channel_norms(first) / factor - 1).abs().max()
        if not error <= TOLERANCE:
            return f"{name} is off by {error:.1g}"
    return None


def count_hooks(make: Make, way: str) -> str:
    """Return how often one step calls the hooks of an optimizer, and those of what it wraps."""
    torch.manual_seed(0)
    net, counts = Net(), Counter({"own": 0})
    nested = [make(net)]
    with suppress(AttributeError):
        nested[0].train()  # schedule-free
    for each in nested:
        inner = optimizers_in(vars(each).values())
        nested += [x for x in inner if not any(x is known for known in nested)]
        with suppress(AttributeError):  # accelerate's has the method, and no hooks
            count = "own" if each is nested[0] else "inner"
            each.register_step_post_hook(lambda *_, count=count: counts.update([count]))
    take_step(net, nested[0], way, 0)
    return ", ".join(f"{name} {calls}" for name, calls in counts.items()) + f" ({way})"


def moves(make: Make, way: str) -> list[dict[str, Tensor]]:
    """Return the weights of training without a rule."""
    weights, _ = train(make, way)
    if not all(q.isfinite().all() for q in weights[-1].values()):
        raise ValueError("weights are not finite without a rule")
    if all(weights[-1][name].equal(q) for name, q in weights[0].items()):
        raise ValueError("it moves nothing without a rule")
    return weights


def try_optimizer(zoo: str, name: str, row: Row) -> None:
    """Put into the row what became of each rule, by the ways of stepping that work without one."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    make = list_optimizers()[zoo][name]
    for way in WAYS:
        has_two = hasattr(make(Net()), "first_step")
        if ("ways" in row and not (has_two and way == "closure")) or (
            way == WAYS[0] and not has_two
        ):
            continue
        try:
            plain = moves(make, way)
        except Exception as error:
            row.setdefault("unbuilt", first_words(error))
            continue
        row.setdefault("hooks", []).append(count_hooks(make, way))
        row.setdefault("ways", {})[way] = {
            rule: outcome_of(rule, make, way, plain) for rule in RULES
        }
        row.pop("unbuilt", None)


def outcome_of(rule: str, make: Make, way: str, plain: list[dict[str, Tensor]]) -> str:
    try:
        fault = find_fault(rule, plain, *train(make, way, rule))
    except InputError as refusal:
        return f"refused: {refusal}"
    except Exception as error:
        return f"wrong: {first_words(error)}"
    return "held" if fault is None else f"wrong: {fault}"


def warm_up() -> None:
    heavyball.utils.compile_mode = None


if __name__ == "__main__":
    sweep(list_optimizers(), try_optimizer, write_optimizers, "zoo_optimizers.jsonl", warm_up)

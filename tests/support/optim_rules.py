"""The rules on optimizer steps, and a small scale-invariant net that is trained under them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlightning import optim
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

MakeRule = Callable[..., Any]
DECAY, SIGMA = 0.5, 0.6  # of the rules that take one for every matrix
# Each rule, from the history of norms that it follows, if it follows one.
RULES: dict[str, MakeRule] = {
    "stable": lambda history, **options: optim.LRCorrection(history, **options),
    "paper": lambda history, **options: optim.LRCorrection(history, mode="paper", **options),
    "layer": lambda history, **options: optim.LRCorrection(history, granularity="layer", **options),
    "schedule": lambda history, **options: optim.NormSchedule(history, **options),
    "decay": lambda _, **options: optim.DecayEquivalentLR(0.01, **options),
    "hyperball": lambda _, **options: optim.Hyperball(**options),
    "projection": lambda _, **options: optim.RadialProjection(**options),
    "corrected": lambda _, **options: optim.CorrectedDecay(DECAY, **options),
    "cautious": lambda _, **options: optim.CautiousDecay(lambda _: DECAY, **options),
    "cap": lambda _, **options: optim.SpectralCap(SIGMA, **options),
    "rows": lambda _, **options: optim.UnitNorm(**options),
    "columns": lambda _, **options: optim.UnitNorm(0, norm="rms", **options),
}
REFERENCED = ("stable", "paper", "layer", "schedule")
SCALE_INVARIANT = (*REFERENCED, "decay")
ANY_MATRIX = ("hyperball", "projection", "corrected", "cautious", "cap", "rows", "columns")
WHOLE = ("hyperball", "cap", "columns")  # they undo the step of a whole weight
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "one by one": {"foreach": False},
    "fused": {"fused": True},
}
# Of what takes several steps in one, so that nothing is known of their length.
LBFGS_REFUSALS = {
    **dict.fromkeys(ANY_MATRIX, "works on single steps, and LBFGS takes several in one"),
    **dict.fromkeys(REFERENCED, "power for LBFGS is not known"),
    "decay": "exact for SGD only, got LBFGS",
}
CONVOLUTIONS = ("conv1.weight", "conv2.weight")


class InvariantNet(nn.Module):
    """Two convolutions under batch norms with next to no eps: scale-invariant in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4, eps=1e-30)
        self.conv2 = nn.Conv2d(4, 5, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(5, eps=1e-30)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def make_net() -> nn.Module:
    """The same net each time, typed so that its layers can be exchanged."""
    return InvariantNet()


def sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.02, "momentum": 0.9, **options})


def draw_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def find_loss(net: nn.Module, step: int) -> Tensor:
    x, target = draw_batch(step)
    return F.cross_entropy(net(x), target)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    first: int = 0,
    each: Callable[[int], None] = lambda _: None,
) -> None:
    """Take steps on the same data for every run."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        find_loss(net, step).backward()
        optimizer.step()
        each(step)


def split_groups(net: nn.Module, decay: float, head_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the convolutions' group with its weight decay, and that of the others."""
    convs = [net.get_parameter(name) for name in CONVOLUTIONS]
    rest = [q for name, q in net.named_parameters() if name not in CONVOLUTIONS]
    return [{"params": convs, "weight_decay": decay}, {"params": rest, "weight_decay": head_decay}]


class NormRows:
    """The norms of a net's convolutions, at the start and each time that they are recorded."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.rows: list[list[Tensor]] = []
        self.record()

    def record(self, _: int = 0) -> None:
        self.rows.append([channel_norms(self.net.get_parameter(n)).float() for n in CONVOLUTIONS])

    def history(self) -> NormHistory:
        """Return them as of one epoch with a record at each step."""
        columns = zip(CONVOLUTIONS, zip(*self.rows, strict=True), strict=True)
        norms = {name: torch.stack(values).numpy() for name, values in columns}
        return NormHistory.from_arrays(norms, range(len(self.rows)), [0] * len(self.rows))


def direction_distance(one: nn.Module, other: nn.Module) -> float:
    """Return 1 − cos of the largest angle between the channels of two nets."""
    pairs = [(one.get_parameter(n), other.get_parameter(n)) for n in CONVOLUTIONS]
    cosines = [torch.cosine_similarity(a.flatten(1), b.flatten(1)).min() for a, b in pairs]
    return 1 - min(cosine.item() for cosine in cosines)


def random_history(net: nn.Module, epochs: int = 10, steps: int = 10) -> NormHistory:
    """Norms at the end of epochs of some steps, somewhere near those of a net's convolutions."""
    generator = torch.Generator().manual_seed(1)
    norms = {}
    for name in CONVOLUTIONS:
        initial = channel_norms(net.get_parameter(name)).float()
        change = 0.5 + torch.rand(epochs, len(initial), generator=generator)
        norms[name] = (initial * change).numpy()
    ends = range(steps, epochs * steps + 1, steps)
    return NormHistory.from_arrays(norms, ends, range(epochs))


def attach(
    make_rule: MakeRule, net: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, torch.optim.SGD, Any]:
    """Return a net, its SGD, and the handle of a rule that follows random norms, if any."""
    net = net or make_net()
    optimizer = sgd(net)
    rule = make_rule(random_history(net), **options)
    return net, optimizer, rule.attach(optimizer, net.named_parameters())


def channel_angles(before: Tensor, after: Tensor) -> Tensor:
    """Return the angle between each row before and after, (C,), in float64 between unit rows."""
    a, b = (w.detach().double().flatten(1) for w in (before, after))
    a, b = (w / w.norm(dim=1, keepdim=True) for w in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))

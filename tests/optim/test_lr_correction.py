"""LRCorrection against ports of the rules that share no line with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmlightning.optim.lr_correction import LRCorrection
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.history import NormHistory

Train = Callable[..., None]
MakeNet = Callable[[], nn.Module]
MakeHistory = Callable[[nn.Module], NormHistory]
LITERAL = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. has no brake")


def groups(net: nn.Module) -> list[dict[str, Any]]:
    head = [q for name, q in net.named_parameters() if name.startswith("head")]
    rest = [q for name, q in net.named_parameters() if not name.startswith("head")]
    return [{"params": rest}, {"params": head, "weight_decay": 5e-4}]


def sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups(net), lr=0.02, momentum=0.9, **options)


class PaperSGD(torch.optim.Optimizer):
    """The rule of the paper, written into SGD's step: Δw = −η · buffer · ‖w‖² / ‖r‖²."""

    def __init__(self, params: Any, references: dict[Tensor, np.ndarray], nesterov: bool) -> None:
        super().__init__(params, {"lr": 0.02, "weight_decay": 0.0})
        self.references, self.nesterov, self.epoch = references, nesterov, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                direction = weight.grad + group["weight_decay"] * weight
                buffer = self.state[weight].get("buffer", torch.zeros_like(weight))
                self.state[weight]["buffer"] = buffer = 0.9 * buffer + direction
                update = direction + 0.9 * buffer if self.nesterov else buffer.clone()
                if weight in self.references:
                    for channel in range(len(weight)):
                        reference = float(self.references[weight][self.epoch][channel])
                        squared = float((weight[channel] ** 2).sum())
                        update[channel] *= squared / reference**2
                weight -= group["lr"] * update


@LITERAL
@pytest.mark.parametrize("nesterov", [False, True])
def test_paper_mode_matches_port(
    make_net: MakeNet, train: Train, random_history: MakeHistory, nesterov: bool
) -> None:
    ours, theirs = make_net(), make_net()
    history = random_history(ours)
    optimizer = sgd(ours, nesterov=nesterov)
    LRCorrection(history, mode="paper").attach(optimizer, ours.named_parameters())
    references = {
        q: history.norms[name] for name, q in theirs.named_parameters() if name in history.norms
    }
    port = PaperSGD(groups(theirs), references, nesterov)

    def next_epoch(step: int) -> None:
        port.epoch = (step + 1) // 10

    train(ours, optimizer, 50)
    train(theirs, port, 50, each=next_epoch)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("granularity", ["channel", "layer"])
@pytest.mark.parametrize("family", ["sgd", "adam"])
def test_stable_mode_by_definition(
    make_net: MakeNet, train: Train, random_history: MakeHistory, granularity: Any, family: str
) -> None:
    """One step at a time: the optimizer's own step, scaled, bounded and projected by hand."""
    net = make_net()
    history = random_history(net)
    if family == "sgd":
        optimizer: torch.optim.Optimizer = sgd(net)
        power, buffers = 2, ["momentum_buffer"]
    else:
        optimizer = torch.optim.Adam(groups(net), lr=0.02)
        power, buffers = 1, ["exp_avg", "exp_avg_sq"]
    correction = LRCorrection(
        history, granularity=granularity, max_factor=1.5, max_rotation=0.05, align="official"
    )
    initial = channel_norms(net.conv1.weight)
    before, plain = net.conv1.weight.detach().clone(), {}
    hook = optimizer.register_step_post_hook(
        lambda *_: plain.update(
            w=net.conv1.weight.detach().clone(),
            **{key: optimizer.state[net.conv1.weight][key].clone() for key in buffers},
        )
    )
    correction.attach(optimizer, net.named_parameters())
    for step in range(12):
        train(net, optimizer, 1, first=step)
        recorded = torch.from_numpy(history.norms["conv1.weight"][step // 10]).double()
        ratios = initial / recorded
        if granularity == "layer":
            ratios = (initial.square().sum() / recorded.square().sum()).sqrt().expand(4)
        for channel in range(4):
            delta = (plain["w"][channel] - before[channel]) * min(ratios[channel] ** power, 1.5)
            bound = 0.05 * before[channel].norm()
            delta *= min(1.0, bound / delta.norm())
            moved = before[channel] + delta
            scale = initial[channel] / moved.norm()
            torch.testing.assert_close(net.conv1.weight[channel].detach(), moved * scale)
            for key in buffers:
                expected = plain[key][channel] / (scale**2 if key == "exp_avg_sq" else scale)
                torch.testing.assert_close(
                    optimizer.state[net.conv1.weight][key][channel], expected
                )
        before = net.conv1.weight.detach().clone()
    hook.remove()


def test_corrected_run_follows_decayed_run(make_net: MakeNet, train: Train) -> None:
    """With a record at each step and no momentum the directions agree as far as the rule can."""
    decayed, corrected, free = make_net(), make_net(), make_net()
    steps = 100
    rows: dict[str, list[Tensor]] = {"conv1.weight": [], "conv2.weight": []}

    def record(_: int = 0) -> None:
        for name, values in rows.items():
            values.append(channel_norms(decayed.get_parameter(name)).float())

    head = [q for name, q in decayed.named_parameters() if not name.startswith("conv")]
    convolutions = [decayed.conv1.weight, decayed.conv2.weight]
    record()
    train(
        decayed,
        torch.optim.SGD([{"params": convolutions, "weight_decay": 1.0}, {"params": head}], lr=0.01),
        steps,
        each=record,
    )
    arrays = {name: torch.stack(values).numpy() for name, values in rows.items()}
    history = NormHistory.from_arrays(arrays, range(steps + 1), [0] * (steps + 1))
    optimizer = torch.optim.SGD(corrected.parameters(), lr=0.01)
    correction = LRCorrection(history, align="interpolate", max_rotation=None)
    correction.attach(optimizer, corrected.named_parameters())
    train(corrected, optimizer, steps)
    train(free, torch.optim.SGD(free.parameters(), lr=0.01), steps)

    def distance(net: nn.Module) -> float:
        pairs = [(net.get_parameter(n), decayed.get_parameter(n)) for n in rows]
        cosines = [torch.cosine_similarity(a.flatten(1), b.flatten(1)).min() for a, b in pairs]
        return 1 - min(cosine.item() for cosine in cosines)

    assert distance(corrected) < 0.02 * distance(free)
    for name, values in arrays.items():
        torch.testing.assert_close(
            channel_norms(corrected.get_parameter(name)).float(), torch.from_numpy(values[0])
        )


@LITERAL
def test_paper_mode_diverges_and_stable_mode_does_not(
    make_net: MakeNet, train: Train, random_history: MakeHistory
) -> None:
    """Norms that only ever shrink, as of channels that weight decay kills."""
    for mode, stays in (("paper", False), ("stable", True)):
        net = make_net()
        initial = {n: channel_norms(net.get_parameter(n)) for n in ("conv1.weight", "conv2.weight")}
        decay = torch.logspace(-1, -4, 10)[:, None]
        history = NormHistory.from_arrays(
            {name: (norms * decay).numpy() for name, norms in initial.items()},
            range(10, 101, 10),
            range(10),
        )
        optimizer = sgd(net)
        LRCorrection(history, mode=mode).attach(optimizer, net.named_parameters())  # type: ignore[arg-type]
        train(net, optimizer, 100)
        growth = max(
            (channel_norms(net.get_parameter(name)) / norms).max().item()
            for name, norms in initial.items()
        )
        # 1e19 is where float32 can no longer form the square of a norm.
        assert growth == pytest.approx(1.0) if stays else growth > 1e19

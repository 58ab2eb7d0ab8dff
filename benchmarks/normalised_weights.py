"""Time that normalising the weights adds to a training step of the same network.

    python benchmarks/normalised_weights.py [--net resnet56] [--batch 128] [--device cuda]

`training_step` says how it is measured. Each computes all weights, and the gradients of what
they are computed from, once, and what ours do after a step. `torch` is
`torch.nn.utils.parametrizations.weight_norm`, `formula` plain operations under autograd.
"""

import copy
import functools
import math
from collections.abc import Callable

import torch
from interleaved import Call
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from training_step import Step, main

from nmlightning import apply_weight_norm
from nmlightning.parametrizations.normalize import normalise_channels


class Formula(nn.Module):
    """Bounded weight norm as one writes it down."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("rho", weight.detach().norm() / len(weight) ** 0.5)

    def forward(self, v: Tensor) -> Tensor:
        return normalise_channels(v, self.rho, 2)  # type: ignore[arg-type]


def by_torch(net: nn.Module) -> None:
    """Weight norm by torch."""
    for conv in convs(net):
        parametrizations.weight_norm(conv)


def by_formula(net: nn.Module) -> None:
    """Bounded weight norm without a derivative of its own."""
    for conv in convs(net):
        parametrize.register_parametrization(conv, "weight", Formula(conv.weight))


FORMS: dict[str, Callable[[nn.Module], object]] = {
    "torch": by_torch,
    "formula": by_formula,
    "weight": functools.partial(apply_weight_norm, kind="weight"),
    "bounded": apply_weight_norm,
    "bounded, L1": functools.partial(apply_weight_norm, p=1),
    "bounded, L∞": functools.partial(apply_weight_norm, p=math.inf),
    "bounded, gains": functools.partial(apply_weight_norm, gain="channel"),
    "bounded, projected": functools.partial(apply_weight_norm, project=True),
}


def make_additions(step: Step) -> dict[str, Call]:
    """Return what each form adds."""
    return {name: make_addition(copy.deepcopy(step.net), form) for name, form in FORMS.items()}


def make_addition(net: nn.Module, normalise: Callable[[nn.Module], object]) -> Call:
    """Return what computes all weights and the gradients behind them, as in a later step."""
    normalise(net)
    layers = convs(net)
    originals = [q for layer in layers for q in layer.parametrizations.parameters()]  # type: ignore[union-attr]
    grads = [torch.randn_like(layer.weight) for layer in layers]
    idle = torch.optim.SGD(originals, 0.0)  # It has no gradients: its step calls the hooks alone.
    net.forward = lambda: [layer.weight for layer in layers]  # what a forward reads

    def run() -> None:
        torch.autograd.grad(net(), originals, grads)
        idle.step()

    return run


def convs(net: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions."""
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


if __name__ == "__main__":
    main(__doc__, make_additions)

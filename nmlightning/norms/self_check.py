"""A short check of the norms on this machine: against the formula in float64, and against torch.

The inputs are multiples of 1/8 whose number is a power of two, so that their mean is exact in every
dtype, and no deviation of one backend has another sign than the same deviation of another.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nmlightning.kernels.dispatch import norm_backend

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest value of each tensor: some 8 units in the last place of its dtype."""

GRID = 8.0  # steps of 1/8
LIMIT = 3.0  # of |x|: 24 steps, which bfloat16 holds
FAR = 8.0  # from any y, so that what ReLU lets pass does not hang on the rounding of a sum


def exact_input(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return values of about a Gaussian's whose sums are exact, of a seed's."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values.clamp(-LIMIT, LIMIT) * GRID).round().div(GRID).to(device, dtype)


def disagreement(layer: nn.Module, x: Tensor) -> float:
    """Return how far output and gradients are from the formula's in float64.

    Returns:
        The largest over y, dx and the gradients of the parameters of max |a − b| / max |b|.
    """
    grad = exact_input(x.shape, x.dtype, str(x.device), seed=1)
    found = _results(copy.deepcopy(layer), x, grad)
    with norm_backend("formula"):
        expected = _results(copy.deepcopy(layer).double(), x.double(), grad.double())
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def time_ratios(layer: nn.Module, reference: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Return the time of a layer's forward and backward over another's, in each round.

    The two take turns in random order; two rounds before are not counted.
    """
    grad = torch.randn_like(x)
    steps = [_step(module, x.detach().requires_grad_(), grad) for module in (layer, reference)]
    ratios = []
    for current in range(rounds + 2):
        seconds = [0.0, 0.0]
        for turn in random.sample([0, 1], 2):
            seconds[turn] = steps[turn]()
        if current >= 2:
            ratios.append(seconds[0] / seconds[1])
    return ratios


def _results(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return y and the gradients by x, what is added and the parameters, in float64."""
    leaves = [x.detach().requires_grad_()]
    if getattr(layer, "fused", None) == "add_relu":
        leaves.append(torch.where(x.flip(0) > 0, FAR, -FAR).to(x.dtype).requires_grad_())
    y = layer(*leaves)
    gradients = torch.autograd.grad(y, (*leaves, *layer.parameters()), grad)
    return [result.detach().double() for result in (y, *gradients)]


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], float]:
    inputs = (x, *layer.parameters())

    def step() -> float:
        _wait_for(x)
        started = time.perf_counter()
        torch.autograd.grad(layer(x), inputs, grad)
        _wait_for(x)
        return time.perf_counter() - started

    return step


def _wait_for(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)

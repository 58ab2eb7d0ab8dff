"""Compares layers in int8 with torch's in float32, and `Int8Linear` with torchao's.

    python benchmarks/int8.py [--rounds 15] [--channels 64] [--size 32] [--batch 16]

Every layer's forward and backward by input and weight, in one process, in turns; with the ratio to
the float32 layer of the same memory format, its quartiles, and the bytes kept for backward. Then
steps of whole networks by SGD, with gradients of weights in bfloat16 and batch norm, or Range batch
norm in int8. The rows of torchao are left out where it is not installed.
"""

import argparse
import copy
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from interleaved import quartiles_of_ratio, time_rounds
from torch import Tensor, nn

from nmlightning import swap_int8
from nmlightning.allocator import keep_freed_memory
from nmlightning.int8 import Int8Conv2d, Int8Linear
from nmlightning.kernels import norm_backend
from nmlightning.models import CifarResNet, ResNet18

Made = dict[str, Callable[[], object]]


def step(layer: nn.Module, x: Tensor, grad: Tensor, backend: str = "auto") -> None:
    """Compute a layer's output and its gradients."""
    with norm_backend(backend):  # type: ignore[arg-type]
        layer(x).backward(grad)
    x.grad = None
    layer.zero_grad()


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return how much a layer keeps for backward, its own parameters left out."""
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.nbytes
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    return sum(n for address, n in kept.items() if address not in own_addresses(layer))


def own_addresses(layer: nn.Module) -> set[int]:
    """Return where the layer's parameters lie."""
    return {q.data_ptr() for q in layer.parameters()}


def add_variants(calls: Made, name: str, plain: nn.Module, ours: type, x: Tensor) -> None:
    """Add the steps of a layer in float32, in int8, and in int8 by the formula."""
    grad = torch.randn_like(plain(x))
    calls[name] = partial(step, plain, x, grad)
    for kind in ("float32", "bfloat16"):
        layer = copy.deepcopy(plain)
        layer.__class__ = ours
        layer.set_up(weight_gradient=kind)
        calls[f"{name} int8, weight gradient {kind}"] = partial(step, layer, x, grad)
        if kind == "float32":
            calls[f"{name} int8 by the formula"] = partial(step, layer, x, grad, "formula")
            share = kept_bytes(layer, x) / kept_bytes(plain, x)
            print(f"{name}: kept for backward {share:.3f} of float32")


def add_torchao(calls: Made, name: str, plain: nn.Linear, x: Tensor) -> None:
    """Add a linear layer's steps by torchao's int8 mixed precision."""
    if find_spec("torchao") is None:
        return
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    grad = torch.randn_like(plain(x))
    holder = nn.Sequential(copy.deepcopy(plain))
    quantize_(holder, int8_mixed_precision_training())
    calls[f"{name} torchao"] = partial(step, holder, x, grad)


def add_networks(calls: Made, memory_format: torch.memory_format) -> None:
    """Add training steps of two networks in float32, and in int8 with and without its norms."""
    layout = "NHWC" if memory_format == torch.channels_last else "NCHW"
    for name, net, shape in (
        ("ResNet-18", ResNet18(10), (32, 3, 64, 64)),
        ("ResNet-20", CifarResNet(20), (128, 3, 32, 32)),
    ):
        net = net.to(memory_format=memory_format)
        x = torch.randn(shape).contiguous(memory_format=memory_format)
        target = torch.randint(10, shape[:1])
        calls[f"{name}-{layout}"] = partial(train, net, optimizer_of(net), x, target)
        for norms in (None, "l1", "range"):
            own = copy.deepcopy(net)
            swap_int8(own, weight_gradient="bfloat16", norms=norms)
            label = " ".join(filter(None, [f"{name}-{layout} int8", norms]))
            calls[label] = partial(train, own, optimizer_of(own), x, target)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum and decay."""
    return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    """Do one step."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), target).backward()
    optimizer.step()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in (("rounds", 15), ("channels", 64), ("size", 32), ("batch", 16)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    keep_freed_memory()  # as training by `nm fit` does
    warnings.filterwarnings("ignore", module="torchao")
    c, calls = options.channels, {}
    for last in (False, True):
        memory_format = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(options.batch, c, options.size, options.size)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        plain = nn.Conv2d(c, c, 3, padding=1, bias=False).to(memory_format=memory_format)
        add_variants(calls, "NHWC" if last else "NCHW", plain, Int8Conv2d, x)
        add_networks(calls, memory_format)
    rows = torch.randn(1024, 8 * c, requires_grad=True)
    linear = nn.Linear(8 * c, 8 * c)
    add_variants(calls, "linear", linear, Int8Linear, rows)
    add_torchao(calls, "linear", linear, rows)
    times = time_rounds(calls, options.rounds)
    for name, seconds in times.items():
        base = name.split()[0]
        ratio = quartiles_of_ratio(times, name, base).format()
        print(f"{name:<40}{1e3 * sorted(seconds)[len(seconds) // 2]:8.2f} ms  {ratio}")
    if "linear torchao" in times:
        for kind in ("float32", "bfloat16"):
            ratio = quartiles_of_ratio(
                times, f"linear int8, weight gradient {kind}", "linear torchao"
            )
            print(f"linear int8, weight gradient {kind} / torchao: {ratio.format()}")


if __name__ == "__main__":
    main()

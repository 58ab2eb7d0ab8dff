"""Time of each norm's forward and backward, as a ratio to torch's norm of its kind.

    python benchmarks/norm_layers.py [--compile] [--device cuda] [--dtype bfloat16] [--rounds 30]
    python benchmarks/norm_layers.py --kind layer    # or rms: norms of tokens

The norms take turns (see `interleaved`); a ratio is the time against torch's in the same round.
"""

import argparse

import torch
from interleaved import Call, quartiles_of_ratio, time_rounds
from torch import Tensor, nn

from nmlightning.norms import (
    L1BatchNorm2d,
    L1LayerNorm,
    L1RMSNorm,
    LInfBatchNorm2d,
    MeanOnlyBatchNorm2d,
    TopKBatchNorm2d,
)

IMAGES = ((128, 16, 32, 32), (128, 64, 8, 8), (32, 64, 56, 56))
TOKENS = ((2000, 512), (25000, 256))
LAYERS: dict[str, dict[str, type[nn.Module]]] = {
    "batch": {
        "l2": nn.BatchNorm2d,
        "l1": L1BatchNorm2d,
        "linf": LInfBatchNorm2d,
        "top10": TopKBatchNorm2d,
        "mean": MeanOnlyBatchNorm2d,
    },
    "layer": {"l2": nn.LayerNorm, "l1": L1LayerNorm},
    "rms": {"l2": nn.RMSNorm, "l1": L1RMSNorm},
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WARM_UP_ROUNDS = 3


def main() -> None:
    """Print a line for each shape and layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=LAYERS, default="batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="compile all of them, torch's too")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(
        f"torch {torch.__version__}, {device}, {options.dtype}, {torch.get_num_threads()} threads"
    )
    classes = LAYERS[options.kind]
    for shape in IMAGES if options.kind == "batch" else TOKENS:
        for layout, memory_format in LAYOUTS.items() if len(shape) == 4 else [("", None)]:
            x = torch.randn(shape, device=device, dtype=getattr(torch, options.dtype))
            if memory_format is not None:
                x = x.contiguous(memory_format=memory_format)
            times = measure(classes, x.requires_grad_(), options.rounds, options.compile)
            ratios = "  ".join(
                f"{name} {quartiles_of_ratio(times, name, to='l2').format()}"
                for name in classes
                if name != "l2"
            )
            print(f"{shape!s:18} {layout}  {ratios}", flush=True)


def measure(
    classes: dict[str, type[nn.Module]], x: Tensor, rounds: int, compiled: bool
) -> dict[str, list[float]]:
    """Return the seconds of each norm in each round after the warm-up."""
    torch.compiler.reset()
    grad = torch.randn_like(x)
    layers = {name: make(x.shape[1]).to(x.device) for name, make in classes.items()}
    if compiled:
        for layer in layers.values():
            layer.compile(dynamic=False)
    steps = {name: layer_step(layer, x, grad) for name, layer in layers.items()}
    return time_rounds(steps, rounds, device=str(x.device), warm_up=WARM_UP_ROUNDS)


def layer_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Call:
    """Return the layer's forward and backward, down to the gradients of x and its parameters."""
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return lambda: torch.autograd.grad(layer(x), (x, *learned), grad)


def backend_of(layer: nn.Module, x: Tensor) -> str:
    """Return what serves a norm for an input of this device, type and layout."""
    backend: str = layer.backend_for(x).backend  # type: ignore[operator]
    return backend


if __name__ == "__main__":
    main()

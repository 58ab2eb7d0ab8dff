"""Runs networks with float16 in real runtimes: as they are, with scaled norms, and with L1.

    python benchmarks/half_safe.py [--only built vit …] [--write docs/half_precision.md]

A cell is the largest error over the largest output, of any sample, against the same network in
float64. Runtimes that are not installed are left out: onnxruntime and onnxconverter-common,
openvino, executorch.
"""

import argparse
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from zoo_tables import replace_between

from nmlightning.export.export import export_network
from nmlightning.export.half_safe_onnx import make_half_safe

Answers = NDArray[np.float64]
Way = Callable[[nn.Module, Path, Tensor], Any]  # the network, its ONNX file, inputs
FORMS = ("original", "scaled", "l1")
SIGMAS = [10.0**power for power in range(-4, 5)]


class Built(nn.Module):
    """A layer norm and an RMS norm of what it gets, as a sum: it fails where its input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(256, 2e-8), nn.RMSNorm(256, 2e-8)
        self.head = nn.Linear(256, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x) + self.rms(x))


class Block(nn.Module):
    """A pre-norm block of a Transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.outer(torch.relu(self.inner(self.norm2(x))))


class OfRows(nn.Module):
    """A Transformer that reads digits row by row."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.places)).mean(1))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)


def trained() -> nn.Module:
    images, labels = digits()
    torch.manual_seed(1)
    net = OfRows()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(400):
        batch = torch.randint(1500, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    right = net.eval()(images[1500:]).argmax(1) == labels[1500:]
    print(f"trained on digits: {right.float().mean():.1%}")
    return net


@torch.no_grad()
def enlarge(net: nn.Module, factor: float) -> nn.Module:
    """Return the network with all that it adds up multiplied, which its norms take out again."""
    net = copy.deepcopy(net)
    layers: list[Any] = [net.embed, *(x for b in net.blocks for x in (b.out, b.outer))]
    for parameter in (net.places, *(q for layer in layers for q in layer.parameters())):
        parameter.mul_(factor)
    return net


def of_timm(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    import timm

    torch.manual_seed(1)
    return timm.create_model(name, num_classes=10, **options).eval(), torch.randn(2, 3, 64, 64)


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=500, num_hidden_layers=3, use_cache=False, **sizes)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(input_ids=ids).logits

    return Logits().eval(), torch.randint(500, (4, 12))


def networks() -> Mapping[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Return each network, and inputs."""

    def built() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(1)
        return Built().eval(), torch.randn(9, 256) * torch.tensor(SIGMAS).unsqueeze(1)

    of_digits = {"digits": 1.0, "digits × 2000": 2000.0}
    found: dict[str, Any] = {"built": built}
    for name, factor in of_digits.items():
        found[name] = lambda factor=factor: (enlarge(trained(), factor), digits()[0][1500:1600])
    found["vit_tiny"] = partial(of_timm, "vit_tiny_patch16_224", img_size=64)
    found["convnext_atto"] = partial(of_timm, "convnext_atto")
    if find_spec("transformers"):
        found["llama"] = llama
    return found


def in_half(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x


def torch_half(net: nn.Module, _: Path, x: Tensor) -> Any:
    return copy.deepcopy(net).half()(in_half(x))


def executorch(net: nn.Module, _: Path, x: Tensor) -> Any:
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    exported = torch.export.export(copy.deepcopy(net).half(), (in_half(x),))
    program = Runtime.get().load_program(to_edge(exported).to_executorch().buffer)
    return program.load_method("forward").execute([in_half(x)])[0]


def half_file(file: Path) -> onnx.ModelProto:
    from onnxconverter_common.float16 import convert_float_to_float16

    return convert_float_to_float16(onnx.load(file), max_finite_val=65504.0)


def feed(x: Tensor) -> dict[str, Any]:
    return {"input": in_half(x).numpy()}


def reference(_: nn.Module, file: Path, x: Tensor) -> Any:
    return ReferenceEvaluator(half_file(file)).run(None, feed(x))[0]


def onnxruntime(_: nn.Module, file: Path, x: Tensor) -> Any:
    from onnxruntime import InferenceSession

    content = half_file(file).SerializeToString()
    return InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feed(x))[0]


def openvino(_: nn.Module, file: Path, x: Tensor, *, hint: str) -> Any:
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(ov.convert_model(file), f"{folder}/net.xml", compress_to_fp16=True)
        options = {"INFERENCE_PRECISION_HINT": hint}
        return ov.Core().compile_model(f"{folder}/net.xml", "CPU", options)(x.numpy())[0]


RUNTIMES: Mapping[str, tuple[str, Way]] = {
    "onnx, op by op": ("onnx", reference),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "OpenVINO, f32": ("openvino", partial(openvino, hint="f32")),
    "OpenVINO, f16": ("openvino", partial(openvino, hint="f16")),
    "ExecuTorch": ("executorch", executorch),
    "torch": ("torch", torch_half),
}


def largest_error(found: Any, right: Answers) -> float:
    """Return the largest error over the largest output, of any sample; infinite for inf or NaN."""
    y = np.asarray(found, np.float64).reshape(len(right), -1)
    error = np.abs(y - right).max(1) / np.abs(right).max(1)
    return float(error.max()) if np.isfinite(error).all() else np.inf


@torch.no_grad()
def measure(net: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """Return of each runtime the errors of the forms, as cells."""
    half = in_half(x).double() if x.is_floating_point() else x
    right = copy.deepcopy(net).double()(half).flatten(1).numpy()
    cells: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            file, plain = Path(folder, f"{form}.onnx"), Path(folder, "original.onnx")
            changed = copy.deepcopy(net)
            if form == "scaled":
                make_half_safe(plain, file)
                from nmlightning.export.half_safe import make_half_safe as swap

                swap(changed, form, lambda _: {}, lambda *_: 0.0)
            else:
                kept = None if form == "original" else form
                export_network(net, file, "onnx", None, inputs=(x,), half_safe=kept)
                if kept:
                    swap(changed, form, lambda each: each(x) is None or {}, lambda *_: 0.0)
            for name, (package, run) in RUNTIMES.items():
                if find_spec(package):
                    cells.setdefault(name, []).append(cell(run, changed, file, x, right))
    return cells


def cell(run: Way, net: nn.Module, file: Path, x: Tensor, right: Answers) -> str:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            error = largest_error(run(net, file, x), right)
    except Exception as problem:  # whatever a runtime raises is its cell
        print(f"    {type(problem).__name__}: {problem}"[:300])
        return "refused"
    return "not finite" if np.isinf(error) else f"{error:.1g}" if error < 1 else f"{error:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="networks")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = ["| network | runtime | original | scaled | L1 |", "|---|---|---|---|---|"]
    for name, make in networks().items():
        if options.only and name not in options.only:
            continue
        for runtime, cells in measure(*make()).items():
            lines.append(f"| {name} | {runtime} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    packages = dict.fromkeys(package for package, _ in RUNTIMES.values())
    print(", ".join(f"{p} {version(p)}" for p in packages if find_spec(p)))
    if options.write:
        replace_between(options.write, "half_safe", "\n".join(lines))


if __name__ == "__main__":
    main()

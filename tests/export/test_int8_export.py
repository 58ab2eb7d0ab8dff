"""Test that networks in int8 are exported with integers in the file, for runtimes without us."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from nmlightning import InputError, apply_weight_norm, export_network, quantize_norm, swap_int8
from nmlightning.int8 import quantizer
from nmlightning.int8.ranges import holder_of
from nmlightning.models import CifarResNet
from scripts import run_without_us

IMAGES = (3, 16, 16)
ALL, NONE = (
    getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{name}_ALL") for name in ("ENABLE", "DISABLE")
)


def train(net: nn.Module, shape: tuple[int, ...] = IMAGES, gains: bool = True) -> nn.Module:
    """Give norms the statistics, and quantisers the ranges, of all of some batches."""
    for module in net.modules():
        for holder in (module, holder_of(module)):
            if hasattr(holder, "momentum"):
                holder.momentum = None
    for parameter in net.train().parameters():
        if parameter.dim() == 1 and gains:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for _ in range(10):
        net(torch.randn(32, *shape))
    return net.eval().requires_grad_(False)


def write(net: nn.Module, folder: Path, shape: tuple[int, ...] = IMAGES, **options: Any) -> Any:
    return export_network(net, folder / "net.onnx", "onnx", shape, **options)


def run(
    folder: Path, x: Tensor, level: Any = ALL, precise: bool = False
) -> tuple[Tensor, Counter[str]]:
    """Return what onnxruntime computes of the file, and the operators that it made of it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    options.log_severity_level = 3  # it warns that the optimised file is of this machine
    session = onnxruntime.InferenceSession(
        folder / "net.onnx", options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"input": x.numpy()})
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return torch.from_numpy(y), Counter(node.op_type for node in nodes)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul"}
PLANE, CUBE = (6, 9, 9), (6, 4, 5, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 9), {}),
    "2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), PLANE, {}),
    "3d": (lambda: nn.Conv3d(6, 8, 3, padding=1), CUBE, {}),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), PLANE, {}),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), PLANE, {}),
    "strided, dilated": (lambda: nn.Conv2d(6, 8, 3, 2, 2, 2), PLANE, {}),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="circular"), PLANE, {}),
    "reflect": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="reflect"), (6, 9), {}),
    "asymmetric": (lambda: nn.Conv2d(6, 8, 4, padding="same"), PLANE, {}),
    "per channel": (lambda: nn.Conv2d(6, 8, 3), PLANE, {"weight_range": "channel"}),
    "linear": (lambda: nn.Linear(6, 8), (6,), {}),
    "linear of 3": (lambda: nn.Linear(6, 8, bias=False), (5, 6), {"weight_range": "channel"}),
    "parametrized": (lambda: nn.Conv2d(6, 8, 3), PLANE, {}),
    **{f"{bits} bits": (lambda: nn.Conv2d(6, 8, 3), PLANE, {"bits": bits}) for bits in range(2, 8)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_a_runtime_agrees_to_one_step_of_the_grid(name: str, tmp_path: Path) -> None:
    """The one behind the layer, in all optimisations; without them but for rounding."""
    make, shape, options = LAYERS[name]
    net = nn.Sequential(make(), nn.Identity())
    if name == "parametrized":
        apply_weight_norm(net)
    swap_int8(net, **options)
    quantize_norm(net[1], bits=options.get("bits", 8))
    train(net, shape)
    report = write(net, tmp_path, shape)
    assert report.quantized == ("0", "1")
    x = 1.5 * torch.randn(33, *shape)  # beyond the ranges, too
    y, operators = run(tmp_path, x)
    step = (net[1].running_max - net[1].running_min) / (2 ** options.get("bits", 8) - 1)
    steps = ((y - net(x)) / step).round()
    # It rounds the bias to multiples of both scales, so few values are above a half or below.
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() <= 0.003 * steps.numel() + 1
    padded_before = name in ("circular", "reflect")
    assert bool(INTEGER & operators.keys()) != padded_before
    exact, _ = run(tmp_path, x, NONE)
    assert ((exact - net(x)) / step).round().count_nonzero() <= 1


def test_file_holds_weights_as_int8_and_nothing_of_ours(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3))
    size = write(train(net), tmp_path).size
    swap_int8(net, norms=None)
    report = write(train(net), tmp_path, overwrite=True)
    assert report.size < 0.3 * size
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.domain for each in model.opset_import] == [""]
    assert not any(node.metadata_props for node in model.graph.node)
    used = {name for node in model.graph.node for name in node.input}
    assert {each.name for each in model.graph.initializer} <= used
    held = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    weights = sorted(tuple(each.dims) for each in held if len(each.dims) > 1)
    assert weights == [(64, 3, 3, 3), (64, 64, 3, 3)]
    text = str(report)
    assert re.search(r"folded 1 batch norm, 2 inputs quantised; outputs differ by \S+$", text)


GAINS = {"negative": -1.0, "zero": 0.0, "nearly zero": 1e-7}


@pytest.mark.parametrize("weight_range", ["tensor", "channel"])
@pytest.mark.parametrize("gain", GAINS)
def test_fold_keeps_the_integers(gain: str, weight_range: str, tmp_path: Path) -> None:
    """Of a channel without scale the bias is all, which the scale of an int32 must hold."""
    first = nn.Conv2d(3, 4, 3, bias=False)
    net = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    swap_int8(net, norms=None, weight_range=weight_range)
    train(net)
    with torch.no_grad():
        net[1].weight[1:3] = GAINS[gain]
    report = write(train(net, gains=False), tmp_path)
    assert [(each.norm, each.into) for each in report.fold.folded] == [("1", "0")]
    x = torch.randn(50, *IMAGES)
    y, operators = run(tmp_path, x)
    assert operators["QLinearConv"] == 1
    # One step in one input of the second convolution.
    step = net[3].running_max / 255 * net[3].weight.abs().max()
    assert (y - net(x)).abs().max() <= 1.01 * step
    assert difference(run(tmp_path, x, NONE)[0], net(x)) <= 1e-5


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may go either way, but a zero point is none off."""
    net = CifarResNet(8)
    swap_int8(net)
    train(net)
    wrong = SimpleNamespace(**vars(quantizer))
    wrong.quantize = lambda x, grid: quantizer.quantize(
        x, grid._replace(zero_point=grid.zero_point + 1)
    )
    monkeypatch.setattr("nmlightning.export.quantized.quantizer", wrong)
    with pytest.raises(InputError, match=r"differs from the trained network by .*, more"):
        export_network(net, tmp_path / "net.pt2", "torch_export", IMAGES)
    assert not list(tmp_path.iterdir())


RESNETS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "Range norms": (lambda: CifarResNet(20), "range"),
    "L1 norms": (lambda: CifarResNet(8), "l1"),
    "folded norms": (lambda: CifarResNet(8), None),
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=10), "range"),
}


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_agree_in_the_top_1(name: str, tmp_path: Path) -> None:
    make, norms = RESNETS[name]
    net, shape = make(), (3, 32, 32)
    swap_int8(net, norms=norms)
    report = write(train(net, shape), tmp_path, shape)
    reasons = {left.reason for left in report.fold.left}
    assert reasons == (set() if norms is None else {"its input is quantised"})
    assert report.difference <= report.tolerance <= 0.1
    x = torch.randn(32, *shape)
    expected = net(x)
    y, operators = run(tmp_path, x)
    assert difference(y, expected) <= report.tolerance
    assert difference(run(tmp_path, x, precise=True)[0], expected) <= report.tolerance
    first, second = expected.topk(2).values.T
    clear = first - second > 2 * (y - expected).abs().amax(1)
    assert torch.equal(y.argmax(1)[clear], expected.argmax(1)[clear])
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    # Of a folded network those have a float output that goes into an addition.
    assert operators["QLinearConv"] == (convolutions if norms else (convolutions - 1) // 2)
    assert report.size < 0.45 * 4 * sum(q.numel() for q in net.parameters())


READ = """
x, y = torch.load("data.pt", weights_only=True)
net = torch.export.load("net.pt2").module()
print(distance(net, x, y), *sorted(str(q.dtype) for q in net.state_dict().values() if q.dim() == 4))
"""


def test_torch_export_holds_the_same(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    swap_int8(net, norms=None, bits=5)
    export_network(train(net), tmp_path / "net.pt2", "torch_export", IMAGES)
    x = torch.randn(5, *IMAGES)
    torch.save([x, net(x)], tmp_path / "data.pt")
    off, *dtypes = run_without_us(READ, tmp_path)
    assert float(off) <= 1e-5
    assert dtypes == ["torch.int8", "torch.int8"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    swap_int8(net)
    with pytest.raises(InputError, match=r"^0, 1 saw no batch in training, so the range of"):
        write(net, tmp_path)
    with pytest.raises(InputError, match=r"the quantised inputs of 0, 1.*or call remove_int8"):
        export_network(train(net), tmp_path / "net.pt", "state_dict", IMAGES)
    assert not list(tmp_path.iterdir())


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x) + self.second(y)


def test_inputs_are_taken_by_their_names(tmp_path: Path) -> None:
    net, inputs = Sum(), {"y": torch.randn(6, 5), "x": torch.randn(6, 3)}
    swap_int8(net)
    net(**inputs)
    report = export_network(net, tmp_path / "net.onnx", "onnx", inputs=inputs)
    assert report.input_names == ("y", "x")

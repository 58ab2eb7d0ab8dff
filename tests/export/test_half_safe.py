"""Networks of other libraries, exported with norms that float16 inference does not break."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from nmlightning import InputError, export_network, swap_norms
from nmlightning.export.examples import name_outputs
from nmlightning.export.half_safe import make_half_safe
from nmlightning.norms import ScaledLayerNorm
from other_libraries import bert, convnext, llama, vit

IDS = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [4], [7], [5]])).long()
TOKENS = {"inputs": {"input_ids": IDS, "attention_mask": MASK}}
IMAGE = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
IMAGES = {"input_shape": (3, 32, 32)}
CASES = [(vit, IMAGES, 5), (convnext, IMAGES, 9), (bert, TOKENS, 5), (llama, TOKENS, 5)]


@pytest.mark.filterwarnings("ignore")  # of what transformers and exporters say of each other
@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize(("make", "given", "count"), CASES)
def test_scaled_networks_are_the_same(
    make: Callable[[], nn.Module], given: dict[str, Any], count: int, format: str, tmp_path: Path
) -> None:
    file = tmp_path / ("net.onnx" if format == "onnx" else "net.pt2")
    report = export_network(make(), file, format, half_safe="scaled", **given)
    assert report.half_safe is not None
    assert len(report.half_safe.swapped) == count
    assert report.half_safe.change < 1e-5  # float32 through some layers
    assert not report.fixed
    assert report.inputs.count("N × sequence") == (2 if given is TOKENS else 0)


class Deep(nn.Module):
    """Norms of inputs whose squares float16 does not hold."""

    def __init__(self, scale: float = 2000.0) -> None:
        super().__init__()
        self.first, self.scale = nn.LayerNorm(64), scale
        self.middle, self.last = nn.Linear(64, 64), nn.RMSNorm(64, 1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.first(x * self.scale)
        return y, {"last": self.last(self.middle(y) * self.scale)}


@pytest.mark.parametrize("norm", ["scaled", "l1"])
def test_l1_norms_are_scaled_and_the_same(norm: str, tmp_path: Path) -> None:
    net = Deep(1.0)
    swap_norms(net, "l1", kinds=["layer"])
    safe = export_network(net, tmp_path / "a.pt2", "torch_export", inputs=[IMAGE], half_safe=norm)
    assert safe.half_safe is not None
    assert safe.half_safe.swapped == ("first", "last")
    assert (safe.half_safe.change < 1e-6) == (norm == "scaled")  # a few ulp of float32
    make_half_safe(net, norm, lambda each: each(IMAGE) and {}, lambda *_: 0.0)
    assert isinstance(net.first, ScaledLayerNorm)
    assert (net.first.p, net.last.p) == (1, 2 if norm == "scaled" else 1)
    swap_norms(net, "lp", {"p": 1.5}, kinds=["layer", "rms"])
    with pytest.raises(InputError, match="has no layer or RMS norm of torch's or the L1 formula"):
        export_network(net, tmp_path / "b.pt2", "torch_export", inputs=[IMAGE], half_safe=norm)


def test_float16_file_is_right(tmp_path: Path) -> None:
    """Each operation of the file in float16; torch computes its own norms in float32."""
    net = Deep().requires_grad_(False)
    export_network(net, tmp_path / "a.pt2", "torch_export", (64,), half_safe="scaled")
    exported = torch.export.load(tmp_path / "a.pt2")
    names = [str(node.target) for node in exported.graph.nodes]
    assert not any("reciprocal" in name for name in names), "Core ML adds 1e-4 to what it inverts"
    program = exported.module().half()
    x = torch.randn(8, 64)
    found, expected = program(x.half()), net.double()(x.half().double())
    for half, exact in zip(found, name_outputs(expected).values(), strict=True):
        assert float((half - exact).abs().max() / exact.abs().max()) < 1e-2


@pytest.mark.parametrize("norm", ["scaled", "l1"])
def test_means_are_of_values_up_to_1(norm: str, tmp_path: Path) -> None:
    """A runtime may add them in float16."""
    x = torch.randn(8, 64)
    export_network(Deep(), tmp_path / "a.onnx", "onnx", inputs=(x,), half_safe=norm)
    model = onnx.load(tmp_path / "a.onnx")
    summed = [node.input[0] for node in model.graph.node if node.op_type == "ReduceMean"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in summed)
    found = ReferenceEvaluator(model).run(summed, {"input": x.numpy()})
    assert len(found) == 4
    assert max(abs(values).max() for values in found) <= 1


def test_exporter_keeps_a_small_eps(tmp_path: Path) -> None:
    net = nn.Sequential(nn.RMSNorm(8, 1e-12), nn.Linear(8, 2))
    export_network(net, tmp_path / "a.onnx", "onnx", (8,))
    (found,) = ReferenceEvaluator(str(tmp_path / "a.onnx")).run(
        None, {"input": torch.zeros(1, 8).numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(found), net(torch.zeros(1, 8)).detach())


class LogOfZero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().log().exp()


def test_reading_a_file_back_warns_of_no_arithmetic(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    export_network(LogOfZero(), tmp_path / "a.onnx", "onnx", (8,))
    assert not [x for x in recwarn if x.category is RuntimeWarning]


def test_l1_is_fitted_to_the_trained_outputs(tmp_path: Path) -> None:
    net = Deep(1.0)
    x = torch.randn(64, 64) * torch.logspace(-1, 1, 64)  # of no Gaussian's mean |x|
    seen: list[nn.Module] = []

    @torch.no_grad()
    def evaluate(each: nn.Module) -> dict[str, float]:
        seen.append(each)
        return {"size": float(each(x)[0].square().mean().sqrt())}

    options: dict[str, Any] = {"half_safe": "l1", "evaluate": evaluate}
    report = export_network(net, tmp_path / "a.onnx", "onnx", (64,), **options)
    assert report.half_safe is not None
    before, after = report.half_safe.metrics["size"]
    assert len(seen) == 2
    assert abs(after / before - 1) < 0.02  # without the fit 0.45
    assert 0 < report.half_safe.change < 0.5


def test_half_safe_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    for net, given, message in (
        (nn.Linear(4, 4), {"half_safe": "scaled"}, "Linear has no layer or RMS norm of torch's"),
        (nn.LayerNorm(4), {"half_safe": "l2"}, "half_safe is None or 'scaled' or 'l1', got 'l2'"),
        (nn.LayerNorm(4), {"half_safe": "l1"}, "half_safe l1 is fitted on batches"),
        (nn.LayerNorm(4), {"inputs": [torch.ones(2, 4), torch.ones(3)]}, "is the batch; they are"),
    ):
        shape = None if "inputs" in given else (4,)
        with pytest.raises(InputError, match=message):
            export_network(net, tmp_path / "a.onnx", "onnx", shape, **given)
    with pytest.raises(InputError, match="a state dict has no norms"):
        export_network(nn.LayerNorm(4), tmp_path / "a", "state_dict", (4,), half_safe="scaled")

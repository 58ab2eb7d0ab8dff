"""Test that what export_network writes is what was trained, for readers without this package."""

import re
import resource
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nmlightning import (
    FoldReport,
    InputError,
    L1BatchNorm2d,
    L1LayerNorm,
    L1RMSNorm,
    apply_weight_norm,
    export_network,
    swap_norms,
)
from nmlightning.export.export import WRITERS
from nmlightning.export.formats import FORMATS
from nmlightning.models import CifarResNet
from scripts import run_without_us

IMAGES = (3, 16, 16)


def train(net: nn.Module) -> nn.Module:
    """Give the norms statistics of a few batches, and weights that are not 1."""
    for parameter in net.parameters():
        if parameter.dim() == 1 and parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for _ in range(3):
        net(2 * torch.randn(8, *IMAGES) + 1)
    return net


def small(norm: str = "l1", **weight_norm: Any) -> nn.Module:
    net = CifarResNet(8)
    if weight_norm:
        apply_weight_norm(net, **weight_norm)
    if norm != "l2":
        swap_norms(net, norm)
    return train(net)


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    return net.eval()(x)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


NETS: dict[str, Callable[[], nn.Module]] = {
    **{norm: lambda norm=norm: small(norm) for norm in ("l2", "l1", "linf", "top10", "lp")},
    "bounded L1": lambda: small("mean", kind="bounded", p=1),
    "bounded L∞": lambda: small("mean", kind="bounded", p="inf"),
    "learned gains": lambda: small("l1", kind="bounded", p=2, gain="channel"),
    "weight norm": lambda: small("linf", kind="weight"),
}


@pytest.mark.parametrize("name", NETS)
def test_state_dict_has_keys_and_outputs_of_the_plain_network(name: str, tmp_path: Path) -> None:
    net, x = NETS[name](), torch.randn(4, *IMAGES)
    report = export_network(net, tmp_path / "a.pt", "state_dict", IMAGES)
    assert len(report.fold or ()) == 7
    assert len(report.made_plain) == (7 if " " in name else 0)
    plain_weights = ", 7 weights made plain" if " " in name else ""
    line = (
        rf"\S+a\.pt \(state_dict, \d+\.\d kB\): folded 7 batch norms{plain_weights}; outputs differ"
    )
    assert re.match(line, str(report))
    plain = CifarResNet(8)
    plain.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert_close(outputs(plain, x), outputs(net, x))
    assert torch.equal(plain.bn1.weight, torch.ones(16))
    torch.testing.assert_close(plain.bn1.running_var, torch.full((16,), 1 - 1e-5))


def test_no_fold_changes_only_the_class(tmp_path: Path) -> None:
    net = small("l1")
    report = export_network(net, tmp_path / "a.pt", "state_dict", IMAGES, fold=False)
    assert report.fold is None
    assert report.difference == 0
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.testing.assert_close(saved, dict(net.state_dict()), rtol=0, atol=0)


READ = """
import torchvision
net = torchvision.models.resnet18(num_classes=7).eval()
net.load_state_dict(torch.load("net.pt", weights_only=True))
x, y = torch.load("data.pt", weights_only=True)
print(distance(net, x, y), distance(torch.export.load("net.pt2").module(), x, y))
"""


def test_exports_load_without_this_package(tmp_path: Path) -> None:
    net = torchvision.models.resnet18(num_classes=7)
    apply_weight_norm(net, p=1)
    swap_norms(net, "l1")
    train(net)
    export_network(net, tmp_path / "net.pt", "state_dict", IMAGES)
    export_network(net, tmp_path / "net.pt2", "torch_export", IMAGES)
    x = torch.randn(5, *IMAGES)
    torch.save([x, outputs(net, x)], tmp_path / "data.pt")
    differences = run_without_us(READ, tmp_path)
    assert len(differences) == 2
    assert max(map(float, differences)) <= 1e-5


@pytest.mark.parametrize("fold", [False, True])
def test_exported_mnasnet_loads_into_torchvisions(fold: bool, tmp_path: Path) -> None:
    """By its version, which the metadata of a state dict tell."""
    net, plain = torchvision.models.mnasnet0_5(), torchvision.models.mnasnet0_5()
    swap_norms(net, "l1")
    export_network(net, tmp_path / "net.pt", "state_dict", (3, 32, 32), fold=fold)
    plain.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = torch.randn(2, 3, 32, 32)
    assert_close(outputs(plain, x), outputs(net, x))


def test_onnx_takes_any_batch(tmp_path: Path) -> None:
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    net, x = small("l1", kind="bounded", p=1), torch.randn(7, *IMAGES)
    export_network(net, tmp_path / "a.onnx", "onnx", IMAGES)
    graph = load(tmp_path / "a.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    (found,) = ReferenceEvaluator(str(tmp_path / "a.onnx")).run(None, {"input": x.numpy()})
    assert_close(torch.from_numpy(found), outputs(net, x))


class LayerNorms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), L1LayerNorm(8), nn.ReLU(), L1RMSNorm(8), nn.LayerNorm(8))
        nn.init.normal_(self[1].weight)


@pytest.mark.parametrize("format", ["torch_export", "onnx"])
def test_layer_norms_export_as_plain_operations(format: str, tmp_path: Path) -> None:
    file = tmp_path / f"net{FORMATS[format].suffix}"
    report = export_network(LayerNorms(), file, format, (6,))  # which compares them
    assert report.fold == FoldReport((), ())


def test_batch_norm_without_running_statistics_is_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), L1BatchNorm2d(4, track_running_stats=False))
    report = export_network(net, tmp_path / "net.pt2", "torch_export", IMAGES)
    assert [left.reason for left in report.fold.left] == ["it keeps no running statistics"]
    x = torch.randn(7, *IMAGES)
    assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), outputs(net, x))


class Branching(nn.Module):
    """No trace holds for all its inputs; nothing of it can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), L1BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("NaN")
        return self.body(x)


def test_untraceable_network_is_written_unfolded(tmp_path: Path) -> None:
    net = train(Branching())
    report = export_network(net, tmp_path / "net", "state_dict", IMAGES)
    assert [left.norm for left in report.fold.left] == ["body.1"]
    assert report.difference == 0


def test_export_network_leaves_the_network_unchanged(tmp_path: Path) -> None:
    net = small("l1", kind="bounded", p=1)
    before, x = repr(net), torch.randn(4, *IMAGES)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.eval()
    expected = net(x)
    export_network(net, tmp_path / "net", "state_dict", IMAGES)
    assert repr(net) == before
    torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(net(x), expected)
    net.train()(x).sum().backward()
    assert net.conv1.parametrizations.weight.original.grad is not None


def test_tied_weights_stay_tied_without_parametrizations(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, second, parametrizations.weight_norm(nn.Linear(4, 3)))
    apply_weight_norm(net, "weight", include=["0.weight"])
    parametrizations.orthogonal(net.append(nn.Linear(3, 3, bias=False))[3])
    report = export_network(net, tmp_path / "net", "state_dict", (4,))
    assert report.made_plain == ("0.weight", "1.weight", "2.weight", "3.weight")
    saved = torch.load(tmp_path / "net", weights_only=True)
    assert list(saved)[:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert saved["0.weight"].data_ptr() == saved["1.weight"].data_ptr()
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3))
    plain.append(nn.Linear(3, 3, bias=False)).load_state_dict(saved)
    x = torch.randn(5, 4)
    assert_close(outputs(plain, x), outputs(net, x))


def test_synchronised_norms_export(tmp_path: Path) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), CifarResNet(8))
    swap_norms(net, "l1", {"sync": True})
    report = export_network(train(net), tmp_path / "net.pt2", "torch_export", IMAGES)
    assert report.fold.counts() == "folded 7 batch norms; 1 not folded"


def test_bfloat16_exports_as_float32(tmp_path: Path) -> None:
    net = small("l1").bfloat16()
    export_network(net, tmp_path / "net", "state_dict", IMAGES)
    saved = torch.load(tmp_path / "net", weights_only=True)
    assert saved["conv1.weight"].dtype == torch.float32


# ---- what is refused; then no file is written ----


class Two(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {x}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[i] for i in range(x.shape[0])])


class Diverged(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        nn.init.constant_(self.weight, torch.nan)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "format": (nn.Identity, {"format": "onxx"}, "'torch_export', got 'onxx'. Did you mean 'onnx'"),
    "folder": (nn.Identity, {"file": "no/net"}, "there is no folder 'no' to write 'net' into"),
    "is a folder": (nn.Identity, {"file": "."}, "'.' is a folder; name a file in it"),
    "suffix": (nn.Identity, {"format": "torch_export"}, "must end in .pt2, got 'net'"),
    "flag": (nn.Identity, {"fold": "no"}, "fold is True or False, got 'no'"),
    "size": (nn.Identity, {"input_shape": (3, 0)}, "a size of input_shape must be a whole number"),
    "one number": (nn.Identity, {"input_shape": 5}, "is a sequence, such as .3, 32, 32., got 5"),
    "inputs": (lambda: nn.Linear(3, 3), {}, "the network does not take inputs of shape 4: .*mat1"),
    "outputs": (Two, {}, "the network returns a set; what can be exported returns tensors"),
    "diverged": (Diverged, {}, "outputs for standard normal inputs of shape 4 are not finite"),
    "layer norm": (lambda: nn.Sequential(L1LayerNorm(4)), {}, "a state dict cannot hold 0: torch"),
    "RMS norm": (lambda: nn.Sequential(L1RMSNorm(4)), {}, "a state dict cannot hold 0: torch"),
    "fixed batch": (
        FixedBatch,
        {"format": "torch_export", "file": "net.pt2"},
        "torch cannot export this network to torch_export: Constraints violated .batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, given, message = REFUSED[name]
    settings = {"file": "net", "format": "state_dict", "input_shape": (4,), **given}
    with pytest.raises(InputError, match=message):
        export_network(make(), **settings)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = PathFinder.find_spec
    monkeypatch.setattr(
        PathFinder,
        "find_spec",
        lambda name, *rest: None if name == "onnxscript" else find(name, *rest),
    )
    monkeypatch.delitem(sys.modules, "onnxscript", raising=False)
    message = r"onnx needs onnxscript: pip install onnxscript"
    with pytest.raises(InputError, match=message):
        export_network(nn.Linear(4, 4), tmp_path / "net.onnx", "onnx", (4,))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """A file of the user's, where the network would be written."""
    file = tmp_path / "net.pt"
    file.write_text("mine")
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: {key: q * (1 + 2e-5) for key, q in net.state_dict().items()}, "by 2.0e-05 of"),
        (lambda net: {"weight": net.weight}, "cannot be read back to be compared.*state_dict"),
    ],
    ids=["another", "half"],
)
def test_wrong_file_is_not_written(
    own_file: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    def write(net: nn.Module, *rest: Any) -> None:
        torch.save(change(net), rest[-1])

    monkeypatch.setattr("nmlightning.export.export.WRITERS", {**WRITERS, "state_dict": write})
    with pytest.raises(InputError, match=message):
        export_network(nn.Linear(4, 4), own_file, "state_dict", (4,), overwrite=True)
    assert own_file.read_text() == "mine"
    assert list(own_file.parent.iterdir()) == [own_file]


def test_uncomparable_onnx_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx's reference evaluator does not know groups of a transposed convolution."""
    monkeypatch.setattr("nmlightning.export.export.find_spec", lambda name: None)
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="onnx cannot be read back to be compared, so nothing"):
        export_network(net, tmp_path / "net.onnx", "onnx", (4, 5, 5))
    assert not list(tmp_path.iterdir())


def test_norm_of_other_channels_is_left(tmp_path: Path) -> None:
    """BatchNorm1d takes (N, C, L), and a linear layer works along L."""
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4))
    report = export_network(net, tmp_path / "net.pt", "state_dict", (4, 3))
    (left,) = report.fold.left
    assert left.reason == "its 4 channels are not the 5 outputs of 0"


@pytest.mark.parametrize(("format", "name"), [("state_dict", "a.pt"), ("torch_export", "a.pt2")])
def test_full_disk_is_reported(format: str, name: str, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"network\.pt2? cannot be written: File too large"):
            export_network(nn.Linear(200, 200), tmp_path / name, format, (200,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

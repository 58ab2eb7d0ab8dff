"""swap_int8 and remove_int8: what becomes int8, what is left and why, and back to what it was."""

import copy
import math
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nmlightning
from nmlightning import apply_weight_norm, remove_int8, remove_weight_norm, swap_int8, swap_norms
from nmlightning.errors import InputError
from nmlightning.int8 import Int8Conv2d, Int8Layer, Int8Linear, quantize_norm
from nmlightning.int8.ranges import describe_int8, options_of
from nmlightning.surgery.checkpoints import swap_like

NETS: dict[str, Any] = {
    "in place": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "ours": lambda: nmlightning.CifarResNet(8),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
    "timm": lambda: timm.create_model("resnet18", num_classes=10),
    "depthwise": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25),
    "attention": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1),
}


def small() -> nn.Sequential:
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*body, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))


def images(count: int = 8, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def train_once(net: nn.Module, x: Tensor) -> None:
    net(x).square().mean().backward()


@pytest.mark.parametrize("name", NETS)
def test_nets_are_swapped_train_and_become_what_they_were(name: str) -> None:
    net, x = (
        NETS[name](),
        images(64 if name == "depthwise" else 16, 64 if name != "attention" else 32),
    )
    before = {n: type(m) for n, m in net.named_modules()}
    keys, parameters = list(net.state_dict()), list(net.parameters())
    report = swap_int8(net)
    layers = [n for n, m in net.named_modules() if isinstance(m, Int8Layer)]
    plain = [n for n, cls in before.items() if issubclass(cls, nn.Conv2d | nn.Linear)]
    assert layers == plain
    norms = [n for n, cls in before.items() if issubclass(cls, nn.BatchNorm2d)]
    assert [swap.name for swap in report.swapped] == layers + norms
    assert not report.left
    train_once(net, x)
    assert all(q.grad is not None and q.grad.isfinite().all() for q in net.parameters())
    assert all(net.get_submodule(n).num_ranges_tracked == 1 for n in layers + norms)
    again = swap_int8(net)
    assert not again.swapped
    net.eval()
    assert torch.equal(net(x), net(x))
    loaded = NETS[name]()
    swap_like(loaded, net.state_dict())
    assert describe_int8(loaded) == describe_int8(net)
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded.eval()(x), net(x))
    assert len(remove_int8(net)) == len(layers + norms)
    assert {n: type(m) for n, m in net.named_modules()} == before
    assert list(net.state_dict()) == keys
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert not any("bits" in vars(m) for m in net.modules())


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def replaced() -> nn.Module:
    layer: Any = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


class OwnNorm(nn.BatchNorm2d):
    pass


OWN_NORM = f"a subclass: name it by types={{'{__name__}.OwnNorm': 'batch'}}"
LEFT = {
    "a transposed convolution": lambda: nn.ConvTranspose2d(3, 8, 3),
    "its own code reads its weights": lambda: nn.LSTM(3, 4),
    "not initialised, run one batch through it": lambda: nn.LazyConv2d(8, 3),
    "its forward was replaced on the object, where no class counts": replaced,
    "a subclass, whose forward may be another": lambda: Own(3, 8, 3),
    f"swap_norms leaves it: {OWN_NORM}": lambda: OwnNorm(8),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_is_named(reason: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), LEFT[reason]())
    before = type(net[1])
    (left,) = swap_int8(net).left
    assert (left.name, left.before, left.reason) == ("1", before.__name__, reason)
    assert type(net[1]) is before
    with pytest.raises(InputError, match="include names layers that cannot compute in int8: 1 "):
        swap_int8(net, include=["1"])
    swap_int8(net, exclude=["1"])


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ("range", nmlightning.RangeBatchNorm2d),
        ("l1", nmlightning.L1BatchNorm2d),
        ("l2", nn.BatchNorm2d),
        (None, nn.BatchNorm2d),
    ],
)
def test_norms_of_torchs_become_what_is_asked(norms: Any, expected: type) -> None:
    net = small()
    swap_int8(net, gradient_bits=4, norms=norms)
    assert type(net[1]) is expected
    assert bool(options_of(net[1])) == (norms is not None)
    assert norms != "range" or net[1].constant == "official"
    train_once(net, images())
    remove_int8(net)
    assert type(net[1]) is nn.BatchNorm2d
    assert list(net.state_dict()) == list(small().state_dict())


@pytest.mark.parametrize("first", ["norms", "int8"])
def test_norms_of_ours_stay_and_are_quantised(first: str) -> None:
    net = small()
    for step in ("norms", "int8") if first == "norms" else ("int8", "norms"):
        swap_norms(net, "l1") if step == "norms" else swap_int8(net)
    assert type(net[1]) is nmlightning.L1BatchNorm2d
    assert options_of(net[1])
    remove_int8(net)
    assert type(net[1]) is nmlightning.L1BatchNorm2d, "as it was not swap_int8 that made it"
    assert not options_of(net[1])


@pytest.mark.parametrize("first", ["weight norm", "int8"])
@pytest.mark.parametrize("removed", ["weight norm", "int8"])
def test_normalised_weights_compute_in_int8(first: str, removed: str) -> None:
    torch.manual_seed(0)
    net, x = small(), images()
    apply_weight_norm(net) if first == "weight norm" else swap_int8(net)
    swap_int8(net) if first == "weight norm" else apply_weight_norm(net)
    assert isinstance(net[0], Int8Conv2d)
    train_once(net, x)
    assert net[0].num_ranges_tracked == 1
    assert net[0].parametrizations.weight.original.grad.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(net)(x), copy.deepcopy(net)(x))
    remove_weight_norm(net) if removed == "weight norm" else remove_int8(net)
    assert isinstance(net[0], Int8Conv2d) == (removed == "weight norm")
    remove_int8(net) if removed == "weight norm" else remove_weight_norm(net)
    assert [type(m) for m in net] == [type(m) for m in small()]


def test_other_parametrizations_shared_and_tied_weights_keep() -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, shared, parametrizations.orthogonal(nn.Linear(6, 6)))
    embedding, output = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    output.weight = embedding.weight
    net.append(output)
    assert [x.name for x in swap_int8(net).swapped] == ["0", "1", "2", "3"]
    train_once(net, torch.randn(20, 6))
    assert shared.num_ranges_tracked == 2
    assert output.weight is embedding.weight
    assert embedding.weight.grad is not None
    assert [x.name for x in remove_int8(net, exclude=["1"]).swapped] == ["2", "3"]


def test_second_call_sets_options_and_keeps_ranges() -> None:
    net = small()
    swap_int8(net, gradient_bits=4)
    train_once(net, images())
    kept = {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "tracked" in k}
    report = swap_int8(net, gradient_bits=2, include=["0", "1"])
    assert [(x.name, x.before, x.after) for x in report.swapped] == [
        ("0", "Int8Conv2d(gradient_bits=4)", "Int8Conv2d(gradient_bits=2)"),
        ("1", *(f"quantised RangeBatchNorm2d(gradient_bits={bits})" for bits in (4, 2))),
    ]
    assert [note["gradient_bits"] for note in describe_int8(net).values()] == [2, 2, 4, 4, 4]
    assert all(torch.equal(net.state_dict()[k], v) for k, v in kept.items())
    assert not swap_int8(net, gradient_bits=2, sync=True, include=["0"]).swapped, "as it computes"
    assert net[0].sync
    assert len(swap_int8(net, bits=7, include=["0"])) == 1
    other = small()
    swap_int8(other, norms="l2")
    assert [x.after for x in swap_int8(other).swapped] == ["quantised RangeBatchNorm2d"] * 2


def test_dry_run_reports_and_changes_nothing() -> None:
    net = small()
    report = swap_int8(net, dry_run=True)
    assert str(report) == (
        "would swap 2 Conv2d → Int8Conv2d, 1 Linear → Int8Linear, "
        "2 BatchNorm2d → quantised RangeBatchNorm2d"
    )
    assert [type(m) for m in net] == [type(m) for m in small()]
    assert swap_int8(net).swapped == report.swapped


def test_copies_pickles_and_compiled_nets() -> None:
    net, x = small(), images()
    swap_int8(net)
    train_once(net, x)
    for made in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        made.eval()
        assert torch.equal(made(x), net.eval()(x))
        remove_int8(made)
    compiled = torch.compile(small())
    assert {x.name for x in swap_int8(compiled).swapped} == {"0", "1", "3", "4", "6"}


@pytest.mark.parametrize("norms", ["range", "l2"])
def test_meta_nets_are_materialised_and_casts_keep_ranges(norms: str) -> None:
    with torch.device("meta"):
        net = small()
    swap_int8(net, norms=norms)
    assert net[0].running_min.is_meta
    net.to_empty(device="cpu")
    layers = [x for x in net if options_of(x)]
    assert len(layers) == 5
    for layer in layers:
        layer.running_min.fill_(1 / 3)
        layer.num_ranges_tracked.fill_(7)
    for dtype in (torch.bfloat16, torch.float64):
        assert all(x.running_min.equal(torch.tensor(1 / 3)) for x in net.to(dtype) if x in layers)
    for layer in layers:
        layer.reset_parameters()
        assert layer.running_min == layer.num_ranges_tracked == 0
        assert layer.weight.isfinite().all()


def test_torchs_encoder_computes_in_int8_in_evaluation() -> None:
    """It would hand the weights of its linear layers to a fused kernel of its own."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    swap_int8(encoder, bits=2, exclude=["*.self_attn*"])
    assert isinstance(encoder.layers[0].linear1, Int8Linear)
    calls: list[Any] = []
    encoder.layers[0].linear1._multiply = lambda *a: calls.append(a) or torch.zeros(20, 16)
    with torch.no_grad():
        mask = torch.zeros(2, 10, dtype=torch.bool)
        encoder.eval()(torch.randn(2, 10, 8), src_key_padding_mask=mask)
    assert len(calls) == 1


def fused() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    swap_norms(net, "l1", fuse="relu")
    return net


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (small, {"bits": 9}, "bits is a whole number of 2 … 8, got 9"),
        (small, {"gradient_bits": 1}, "gradient_bits is a whole number of 2 … 8, got 1"),
        (small, {"rounding": "up"}, "rounding"),
        (small, {"bifurcate": 2}, "bifurcate"),
        (small, {"weight_gradient": "int8"}, "weight_gradient"),
        (small, {"momentum": math.inf}, "momentum"),
        (small, {"norms": "l7"}, "There is no norm 'l7'"),
        (small, {"include": "0"}, "include"),
        (small, {"include": ["9"]}, "'9' in include matches no convolution or linear layer of Seq"),
        (small, {"exclude": ["*"]}, "There is no convolution or linear layer in Sequential, or no"),
        (small, {"dry_run": 2}, "dry_run"),
        (nn.ReLU, {}, "There is no convolution or linear layer in ReLU"),
        (lambda: nn.LSTM(3, 3), {}, "LSTM has no layer that can compute in int8: LSTM: its"),
        (fused, {}, "1 also does the ReLU behind it, whose gradient is not the norm's"),
    ],
)
def test_errors_say_what_was_wrong_and_nothing_changed(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    net = make()
    before = [(type(m), dict(vars(m))) for m in net.modules()]
    with pytest.raises(InputError, match=message):
        swap_int8(net, **arguments)
    assert [(type(m), dict(vars(m))) for m in net.modules()] == before


def test_remove_refuses_what_is_not_in_int8() -> None:
    with pytest.raises(InputError, match="There is no layer in int8 in Sequential"):
        remove_int8(small())
    net = small()
    swap_int8(net, norms=None)
    quantize_norm(net[1])
    with pytest.raises(InputError, match="'5' in exclude matches no layer in int8"):
        remove_int8(net, exclude=["5"])
    assert len(remove_int8(net)) == 4


@pytest.mark.parametrize("place", [1, 6])
def test_sharded_layers_are_refused_and_nothing_changed(place: int) -> None:
    class DTensor(nn.Parameter):
        pass

    net = small()
    for change in (swap_int8, remove_int8):
        types, plain = [type(m) for m in net], net[place].weight
        net[place].weight = DTensor(plain.detach())
        with pytest.raises(InputError, match=f"{place} is sharded"):
            change(net)
        assert [type(m) for m in net] == types
        assert len(describe_int8(net)) == (5 if change is remove_int8 else 0)
        net[place].weight = plain
        change(net)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_what_is_no_module_or_scripted_is_refused() -> None:
    for change in (swap_int8, remove_int8):
        for model in ("model", None):
            with pytest.raises(InputError, match=f"model is a torch.nn.Module, got {model!r}"):
                change(model)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"There is no .* in RecursiveScriptModule"):
            change(torch.jit.script(small()))


def test_conversion_of_quantised_norms_is_refused() -> None:
    net = nn.Sequential(nn.LayerNorm(8), *small())
    swap_int8(net, norms="l2")
    quantize_norm(net[0])
    with pytest.raises(InputError, match="convert_sync_batchnorm would leave this quantised Batch"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    remove_int8(net)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[2]) is nn.SyncBatchNorm


def test_a_layer_with_a_quantised_input_becomes_int8_whole() -> None:
    net = small()
    quantize_norm(net[0])
    copied = small()
    swap_like(copied, net.state_dict())
    assert describe_int8(copied) == describe_int8(net)
    assert next(x.before for x in swap_int8(net).swapped) == "quantised Conv2d"
    net(images())
    assert net[0].num_ranges_tracked == 1
    assert not swap_int8(net).swapped

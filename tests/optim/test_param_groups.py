"""Parameter groups hold every trainable parameter once, and exempt those of the scope."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from nmlightning import apply_weight_norm
from nmlightning.errors import InputError
from nmlightning.models.resnet import CifarResNet
from nmlightning.optim.param_groups import find_output_layers, parameter_groups
from optim_rules import CONVOLUTIONS, find_loss, make_net

DECAY = 5e-4


def named_like_a_norm(name: str) -> nn.Module:
    """Return a norm of another package, known by its name alone."""
    module = type(name, (nn.Module,), {})()
    module.weight = nn.Parameter(torch.ones(4))
    return module


def decay_of(model: nn.Module, scope: str, decay: float = DECAY) -> dict[str, float]:
    """Return the decay of every parameter by name, after a check that each is there once."""
    groups = parameter_groups(model, decay, scope)
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert all(group["params"] for group in groups)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == found.keys()
    return {name: found[id(p)] for name, p in trainable.items()}


@pytest.mark.parametrize(
    ("scope", "decaying"),
    [
        ("all", lambda name: True),
        ("no_norm", lambda name: ("conv" in name or "fc" in name) and "weight" in name),
        ("last_layer", lambda name: name.startswith("fc")),
        ("no_conv", lambda name: "conv" not in name and "shortcut.0" not in name),
    ],
)
def test_scope_exempts_parameters_of_a_resnet(scope: str, decaying: object) -> None:
    decays = decay_of(CifarResNet(20), scope)
    assert decays == {name: DECAY if decaying(name) else 0.0 for name in decays}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        *map(named_like_a_norm, ["RmsNorm2d", "RmsNormFp32", "EvoNorm2dS0", "ConvNextV2GRN"]),
        *map(named_like_a_norm, ["MambaRMSNormGated", "FilterResponseNormTlu2d", "instancenorm"]),
        type("Scaled", (nn.BatchNorm2d,), {})(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_no_norm_exempts_every_kind_of_norm(norm: nn.Module) -> None:
    decays = decay_of(nn.Sequential(nn.Linear(4, 4), norm), "no_norm")
    assert decays.pop("0.weight") == DECAY
    assert set(decays.values()) == {0.0}


def test_no_norm_exempts_biases_by_any_name() -> None:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 4)])
    decays = decay_of(model, "no_norm")
    assert {name for name, decay in decays.items() if decay == 0} == {
        name for name in decays if "bias" in name
    }


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def parametrized_net() -> nn.Module:
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 1), "bn": nn.BatchNorm2d(4)})
    for layer in net.values():
        for name in ("weight", "bias"):
            register_parametrization(layer, name, Scaled())
    return net


@pytest.mark.parametrize(
    ("scope", "decaying"),
    [
        ("no_norm", lambda name: name.startswith("conv.parametrizations.weight")),
        ("no_conv", lambda name: not name.startswith("conv.parametrizations.weight")),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_parametrizations_parameters_are_grouped_with_their_tensor(
    scope: str, decaying: Callable[[str], bool], compiled: bool
) -> None:
    net = parametrized_net()
    decays = decay_of(torch.compile(net, backend="eager") if compiled else net, scope)
    assert len(decays) == 8
    for name, decay in decays.items():
        assert decay == (DECAY if decaying(name.removeprefix("_orig_mod.")) else 0.0), name


def by_hand(layer: nn.Module) -> nn.Module:
    layer.weight_bar = nn.Parameter(layer._parameters.pop("weight").detach())
    return layer


COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "spectral": nn.utils.spectral_norm,
    "old": nn.utils.weight_norm,
    "new": weight_norm,
    "pruned spectral": lambda layer: prune.l1_unstructured(
        nn.utils.spectral_norm(layer), "weight_orig", 0.5
    ),
    "by hand": by_hand,
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_parameters_that_hooks_compute_weights_from_are_grouped_with_them(name: str) -> None:
    net = nn.Sequential(COMPUTED[name](nn.Conv2d(2, 4, 1)), COMPUTED[name](nn.Linear(4, 4)))
    decays = decay_of(net, "no_conv")
    assert {n for n, decay in decays.items() if not decay} == {
        n for n in decays if n[0] == "0" and n != "0.bias"
    }
    gains = [n for n, decay in decay_of(net, "no_norm").items() if not decay and "bias" not in n]
    assert [n.endswith(("weight_g", "original0")) for n in gains] == [True] * len(gains)
    assert len(gains) == (2 if name in ("old", "new") else 0)


def test_no_norm_exempts_gains_of_our_weight_norm() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(4, 4))
    apply_weight_norm(net, "weight")
    decays = decay_of(net, "no_norm")
    assert [n for n, decay in decays.items() if decay] == [
        "0.parametrizations.weight.original",
        "1.weight",
    ]


def towers(texts: int = 8, name: str = "text_projection") -> nn.Module:
    net = nn.ModuleDict({"text": nn.Linear(3, texts), "image": nn.Linear(3, 6)})
    net["image_projection"] = nn.Linear(6, 4)
    net[name] = nn.Linear(texts, 4)
    return net


def segments() -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(3, 8), "classifier": nn.Conv2d(8, 2, 1)})


def detector() -> nn.Module:
    boxes = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    return nn.ModuleDict({"net": nn.Conv2d(3, 6, 1), "kind": nn.Linear(6, 3), "box": boxes})


def encoder() -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(2)))


def linears(**shapes: tuple[int, int]) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})


def gan() -> nn.Module:
    net = nn.ModuleDict({"g": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))})
    net["d"] = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    return net


def semantic() -> nn.Module:
    """Like BEiT's: convolutions give the outputs of a model with linear layers."""
    net = nn.ModuleDict({"body": nn.Linear(3, 8), "decode": nn.Sequential(nn.Conv2d(8, 5, 1))})
    net["auxiliary"] = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1))
    return net


@pytest.mark.parametrize(
    ("make", "expected", "doubt"),
    [
        (towers, ["text_projection", "image_projection"], "image_projection beside it may not"),
        (lambda: towers(4), ["text_projection", "image_projection"], "beside it"),
        (lambda: towers(7, "last"), ["last", "image_projection"], "beside it"),
        (
            lambda: linears(trunk=(3, 8), policy=(8, 4), value=(8, 1)),
            ["value", "policy"],
            "policy beside it may not lead into it",
        ),
        (segments, ["classifier"], r"classifier \(Conv2d\) is its last, and its last nn.Linear"),
        (detector, ["box.1", "kind"], "box.1 is its last, and kind beside it may not lead into it"),
        (lambda: linears(fc1=(8, 4), fc2=(4, 4), fc3=(4, 4)), ["fc3"], ""),
        (encoder, ["1.linear2"], "1.linear2 is its last, and may give what"),
        (lambda: nn.Sequential(encoder(), nn.Linear(4, 2)), ["1"], ""),
        (lambda: linears(q_proj=(4, 4), v_proj=(4, 4), out_proj=(4, 4)), ["out_proj"], ""),
        (lambda: linears(head=(8, 3), body=(4, 8)), ["head"], "body is its last, by its shape may"),
        (lambda: linears(final=(8, 3), fc1=(4, 8), fc2=(8, 8)), ["final"], "may lead into final"),
        (
            lambda: linears(policy=(8, 3), body=(4, 8), value=(8, 1)),
            ["value", "policy"],
            "policy beside it",
        ),
        (
            lambda: linears(classifier=(8, 10), backbone=(20, 8), projector=(8, 4)),
            ["projector", "classifier"],
            "classifier beside it",
        ),
        (lambda: linears(pre_classifier=(8, 8), classifier=(8, 3)), ["classifier"], ""),
        (gan, ["d.1", "g.1"], "g.1 beside it"),
        (
            lambda: nn.ModuleDict({"encoder": encoder(), "dense": nn.Linear(4, 4)}),
            ["dense"],
            "dense is its last, and may give what other",
        ),
        (lambda: linears(body=(3, 4), pooler=(4, 4)), ["pooler"], "pooler is its last"),
        (semantic, ["auxiliary.1", "decode.0"], "decode.0 beside it"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), ["1"], ""),
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 1)), [], ""),
    ],
)
def test_output_layers_and_the_doubt_about_them(
    make: Callable[[], nn.Module], expected: list[str], doubt: str
) -> None:
    model = make()
    names = {module: name for name, module in model.named_modules()}
    found = find_output_layers(nn.ModuleDict({"net": model}))
    assert [names[layer] for layer in found.layers] == expected
    assert bool(found.doubt) == bool(doubt)
    if doubt:
        with pytest.warns(UserWarning, match=doubt):
            decays = decay_of(model, "last_layer")
        assert {name.rpartition(".")[0] for name, decay in decays.items() if decay} == set(expected)


def test_no_norm_exempts_a_parametrized_norm() -> None:
    norm = nn.LayerNorm(4)
    register_parametrization(norm, "weight", Scaled())
    assert set(decay_of(norm, "no_norm").values()) == {0.0}


@pytest.mark.parametrize("name", ["NormalizedLinear", "NormHead"])
def test_layer_named_like_a_norm_decays(name: str) -> None:
    layer = type(name, (nn.Linear,), {})(4, 4, bias=False)
    assert decay_of(layer, "no_norm") == {"weight": DECAY}


@pytest.mark.parametrize("scope", ["all", "no_norm", "no_conv", "last_layer"])
def test_tied_parameters_are_grouped_once_and_frozen_ones_left_out(scope: str) -> None:
    embedding, middle, head = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    head.weight = embedding.weight
    middle.bias.requires_grad_(False)
    decays = decay_of(nn.Sequential(embedding, middle, head), scope)
    assert decays == {"0.weight": DECAY, "1.weight": 0.0 if scope == "last_layer" else DECAY}


def test_weight_decay_none_keeps_the_optimizers() -> None:
    net = CifarResNet(20)
    optimizer = torch.optim.SGD(parameter_groups(net, None, "no_norm"), lr=0.1, weight_decay=DECAY)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]


@pytest.mark.parametrize(
    ("model", "decay", "scope", "message"),
    [
        (nn.Linear(2, 2), DECAY, "nonorm", r"one of all, no_norm, no_conv, last_layer, scale_inv"),
        (nn.Linear(2, 2), -1.0, "all", r"weight_decay must be 0 or more, got -1\.0"),
        (nn.Linear(2, 2), float("nan"), "all", "must be 0 or more, got nan"),
        (nn.Linear(2, 2), "0.1", "all", "weight_decay must be 0 or more, got '0.1'"),
        (nn.Conv2d(2, 2, 1), DECAY, "last_layer", r"needs an nn\.Linear, and Conv2d has none"),
        (nn.ReLU(), DECAY, "all", "ReLU has no trainable parameter"),
    ],
)
def test_groups_refuse_bad_input(model: nn.Module, decay: float, scope: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parameter_groups(model, decay, scope)


# Of models of others: how many matrices are Muon's, and what of two dimensions is not.
OTHERS: dict[str, tuple[int, set[str]]] = {
    "torchvision/resnet18": (0, {"fc.weight"}),
    "torchvision/mobilenet_v3_small": (1, {"classifier.3.weight"}),
    "torchvision/vit_b_16": (4 * 12, {"heads.head.weight"}),
    "torchvision/swin_t": (4 * 12 + 3, {"head.weight", "relative_position_bias_table"}),
    "timm/vit_tiny_patch16_224": (4 * 12, {"head.weight"}),
    "timm/vit_tiny_patch16_224, num_classes=0": (4 * 12, set()),
    "timm/mixer_s32_224": (4 * 8, {"head.weight"}),
    "timm/convnext_atto": (0, {"head.fc.weight"}),
    "timm/deit_tiny_distilled_patch16_224": (4 * 12, {"head.weight", "head_dist.weight"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_split_for_muon_of_models_of_others(name: str) -> None:
    """Each parameter is in one group, and torch's Muon takes those that are marked."""
    package, _, made = name.partition("/")
    made, _, options = made.partition(", ")
    with torch.device("meta"):
        if package == "timm":
            model = timm.create_model(made, **({"num_classes": 0} if options else {}))
        else:
            model = torchvision.models.get_model(made)
    groups = parameter_groups(model, DECAY, "no_norm", split="muon")
    members = [p for group in groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert len(members) == len(set(members))
    hidden = [p for group in groups if group["use_muon"] for p in group["params"]]
    count, left = OTHERS[name]
    assert len(hidden) == count
    matrices = {path: p for path, p in model.named_parameters() if p.dim() == 2}
    rest = {path for path, p in matrices.items() if not any(p is q for q in hidden)}
    assert {path if path in left else path.rpartition(".")[2] for path in rest} == left
    muon, rest = ([group for group in groups if group["use_muon"] is x] for x in (True, False))
    assert not muon or torch.optim.Muon(muon).param_groups[0]["weight_decay"] == DECAY
    assert torch.optim.AdamW(rest)


def test_split_leaves_what_is_shared_or_computed() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(6, 4),
            "tied": nn.Linear(4, 6, bias=False),
            "hidden": weight_norm(nn.Linear(4, 4, bias=False)),
            "lstm": nn.LSTM(4, 4),
            "head": nn.Linear(4, 3),
        }
    )
    model["tied"].weight = model["embedding"].weight
    with pytest.warns(UserWarning, match="what is left to AdamW as such is head, tied"):
        groups = parameter_groups(model, None, split="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    marked = [names[id(p)] for p in groups[0]["params"]]
    assert marked == ["hidden.parametrizations.weight.original1"]
    assert [group["use_muon"] for group in groups] == [True, False]
    assert "weight_decay" not in groups[0]


def test_only_weights_measured_to_be_scale_invariant_decay() -> None:
    net = make_net()
    with pytest.raises(InputError, match="'scale_invariant' measures gradients, and there ar"):
        parameter_groups(net, DECAY, "scale_invariant")
    find_loss(net, 0).backward()
    decays = decay_of(net, "scale_invariant")
    assert {name for name, decay in decays.items() if decay} == set(CONVOLUTIONS)
    with pytest.raises(InputError, match="split is None or 'muon', got 'adam'"):
        parameter_groups(net, DECAY, split="adam")  # type: ignore[arg-type]

"""Test what is normalised, what stays the same, and what is refused."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from nmlightning import (
    Hyperball,
    InputError,
    RadialProjection,
    apply_weight_norm,
    channel_norms,
    remove_weight_norm,
)
from nmlightning.weights.channel_norms import ROWS, ChannelLayout

NORMS = [1.0, 2.0, math.inf]
FORMS: dict[str, dict[str, Any]] = {
    "bounded": {"kind": "bounded"},
    "bounded, gains": {"kind": "bounded", "gain": "channel"},
    "weight": {"kind": "weight"},
    "weight, a gain a layer": {"kind": "weight", "gain": "layer"},
}
LAYOUTS = {0: ROWS, 2: ChannelLayout(2)}


def norms_of(net: nn.Sequential, layer: int, p: float) -> Tensor:
    return channel_norms(net[layer].weight, p, LAYOUTS[layer])


def train(net: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()


def power_mean(norms: Tensor, p: float) -> Tensor:
    return norms.max() if p == math.inf else norms.pow(p).mean().pow(1 / p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_apply_gives_the_defined_norms(
    net: nn.Sequential, images: Tensor, form: str, p: float
) -> None:
    before, output = copy.deepcopy(net), net(images)
    report = apply_weight_norm(net, p=p, **FORMS[form])
    assert list(report.weights) == ["0.weight", "2.weight"]
    for layer, rho in zip((0, 2), report.weights.values(), strict=True):
        old, new = norms_of(before, layer, p), norms_of(net, layer, p)
        torch.testing.assert_close(torch.tensor(rho), power_mean(old, p))
        by_channel = FORMS[form].get("gain", "channel" if form == "weight" else None) == "channel"
        torch.testing.assert_close(new, old if by_channel else torch.full_like(new, rho))
    if form in ("weight", "bounded, gains"):
        torch.testing.assert_close(net(images), output)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("project", [False, True])
def test_bounded_norms_stay_exact_in_training(
    net: nn.Sequential, images: Tensor, p: float, project: bool
) -> None:
    rho = apply_weight_norm(net, p=p, project=project).weights["0.weight"]
    untrained = copy.deepcopy(net)

    def error(net: nn.Sequential) -> float:
        return float((norms_of(net, 0, p) / rho - 1).abs().max())

    assert error(net) < 1e-6
    train(net, images, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), 10)
    assert error(net) < 1e-6
    untrained.load_state_dict(copy.deepcopy(net.state_dict()))
    assert error(untrained) < 1e-6
    assert torch.equal(untrained(images), net(images))


def test_bounded_gains_keep_their_norm(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, gain="channel")
    before = norms_of(net, 0, 2).norm()
    train(net, images, torch.optim.SGD(net.parameters(), 0.1), 10)
    now = norms_of(net, 0, 2)
    assert now.norm() == pytest.approx(float(before), rel=1e-6)
    assert now.std() > 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck(form: str) -> None:
    net, image = nn.Conv2d(2, 3, 2).double(), torch.randn(1, 2, 2, 2).double()
    apply_weight_norm(net, **FORMS[form])
    parameters = dict(net.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(net, given, image).square().mean()

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()))
    assert torch.autograd.gradgradcheck(loss, tuple(parameters.values()))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_weight_is_the_same_in_inference_mode(net: nn.Sequential, form: str, p: float) -> None:
    apply_weight_norm(net, p=p, **FORMS[form])
    with torch.inference_mode():
        weight = net.eval()[0].weight
    torch.testing.assert_close(weight, net.train()[0].weight)


def test_gains_of_frozen_weights_are_frozen(net: nn.Sequential) -> None:
    net[0].requires_grad_(False)
    apply_weight_norm(net, "weight")
    gains = {name: q for name, q in net.named_parameters() if name.endswith("gain")}
    assert [gain.requires_grad for gain in gains.values()] == [False, True]


@pytest.mark.parametrize("rule", [Hyperball, RadialProjection])
@pytest.mark.parametrize("form", ["weight", "weight, a gain a layer", "bounded, gains"])
def test_rules_leave_gains_alone(
    net: nn.Sequential, images: Tensor, form: str, rule: type[Hyperball | RadialProjection]
) -> None:
    apply_weight_norm(net, **FORMS[form])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for model in (net, net.named_parameters()):
        handle = rule().attach(optimizer, model)
        assert len(handle.reasons()) == 3
        handle.remove()


@pytest.mark.parametrize("form", FORMS)
def test_remove_restores_parameters_and_values(
    net: nn.Sequential, images: Tensor, form: str
) -> None:
    names, parameters = zip(*net.named_parameters(), strict=True)
    apply_weight_norm(net, **FORMS[form])
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, images, optimizer, 3)
    copied = copy.deepcopy(net)
    output = net(images)
    assert remove_weight_norm(net) == ["0.weight", "2.weight"]
    assert torch.equal(net(images), output)
    assert [name for name, _ in net.named_parameters()] == list(names)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert {q for g in optimizer.param_groups for q in g["params"]} == set(parameters)
    assert type(net[0]) is nn.Conv2d
    assert torch.equal(copied(images), output)  # a copy is none the worse for it


@pytest.mark.parametrize("form", ["weight", "bounded, gains"])
def test_apply_adds_gains_to_given_optimizers(
    net: nn.Sequential, images: Tensor, form: str
) -> None:
    convs = [net[0].weight, net[2].weight]
    rest = [q for q in net.parameters() if not any(q is w for w in convs)]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": convs, "lr": 0.5}], 0.1)
    with pytest.raises(InputError, match=r"trains 0\.weight and would not train its gain"):
        apply_weight_norm(net, **FORMS[form])
    assert type(net[0]) is nn.Conv2d
    apply_weight_norm(net, optimizers=optimizer, **FORMS[form])
    gains = [q for name, q in net.named_parameters() if name.endswith(".gain")]
    assert [id(q) for q in optimizer.param_groups[1]["params"]] == [
        *map(id, convs),
        *map(id, gains),
    ]
    assert net[0].parametrizations.weight.original is convs[0]
    before = [q.detach().clone() for q in (*gains, net[0].weight)]
    train(net, images, optimizer, 1)
    after = (*gains, net[0].weight)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_apply_adds_gains_to_param_names(net: nn.Sequential) -> None:
    optimizer = torch.optim.AdamW(net.named_parameters())
    names = list(optimizer.param_groups[0]["param_names"])
    apply_weight_norm(net, "weight", optimizers=optimizer)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == [*names, "0.weight gain", "2.weight gain"]
    assert len(group["params"]) == len(group["param_names"])
    remove_weight_norm(net)
    assert optimizer.param_groups[0]["param_names"] == names


def test_apply_refuses_gains_in_lbfgs(net: nn.Sequential) -> None:
    optimizer = torch.optim.LBFGS(net.parameters())
    with pytest.raises(InputError, match="LBFGS cannot add gains"):
        apply_weight_norm(net, "weight", optimizers=optimizer)
    apply_weight_norm(net, optimizers=optimizer)


def test_apply_takes_a_number_for_rho(net: nn.Sequential) -> None:
    apply_weight_norm(net, rho=0.5)
    torch.testing.assert_close(norms_of(net, 0, 2), torch.full((8,), 0.5))
    remove_weight_norm(net)
    apply_weight_norm(net, "weight", rho=2)
    torch.testing.assert_close(norms_of(net, 0, 2), torch.full((8,), 2.0))


def test_assigned_weight_sets_the_gains(net: nn.Sequential) -> None:
    apply_weight_norm(net, "weight")
    new = torch.randn(8, 3, 3, 3)
    net[0].weight = new
    torch.testing.assert_close(net[0].weight, new)


def test_include_and_exclude_take_globs(net: nn.Sequential) -> None:
    report = apply_weight_norm(net, include=["*.weight"], exclude=["2.*"])
    assert list(report.weights) == ["0.weight", "5.weight"]
    assert str(report) == "bounded weight norm (L2) on 2 weights"
    assert remove_weight_norm(net, include=["5.*"]) == ["5.weight"]
    assert type(net[5]) is nn.Linear
    assert type(net[0]) is not nn.Conv2d


def test_tied_weight_is_normalised_once_and_stays_tied() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(10, 6, padding_idx=0), "out": nn.Linear(6, 10)})
    net["out"].weight = net["embed"].weight
    assert list(apply_weight_norm(net, "weight", include=["out.weight"]).weights) == [
        "embed.weight"
    ]
    assert torch.equal(net["embed"].weight, net["out"].weight)
    assert sum(q.numel() for q in net.parameters()) == 60 + 10 + 10
    assert (net["embed"].weight[0] == 0).all()
    remove_weight_norm(net)
    assert net["embed"].weight is net["out"].weight


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_apply_normalises_recurrent_layers(cls: type[nn.Module]) -> None:
    layer, x = cls(5, 7, 2), torch.randn(3, 2, 5)
    output = layer(x)[0]
    apply_weight_norm(layer, "weight", include=["weight_*"])
    torch.testing.assert_close(layer(x)[0], output)
    train(nn.Sequential(layer, _First()), x, torch.optim.SGD(layer.parameters(), 0.5), 1)
    assert (layer(x)[0] - output).abs().max() > 1e-3
    assert channel_norms(layer.weight_ih_l0).shape == (len(layer.weight_ih_l0),)


class _First(nn.Module):
    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return outputs[0]


@pytest.mark.parametrize("training", [True, False])
def test_apply_normalises_attention_projections(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 3, 8)
    output = layer(x)
    apply_weight_norm(layer, "weight", include=["*proj*weight", "linear*.weight"])
    torch.testing.assert_close(layer(x), output)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), output)


@pytest.mark.parametrize("form", FORMS)
def test_model_compiles_without_graph_breaks(net: nn.Sequential, images: Tensor, form: str) -> None:
    apply_weight_norm(net, **FORMS[form])
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    grads = []
    for model in (net, compiled):
        net.zero_grad()
        model(images).square().mean().backward()
        grads.append([q.grad for q in net.parameters()])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(compiled(images), net(images))


def test_model_exports(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, "weight")
    exported = torch.export.export(net.eval(), (images,))
    torch.testing.assert_close(exported.module()(images), net(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cast_keeps_the_norms(net: nn.Sequential, dtype: torch.dtype) -> None:
    rho = apply_weight_norm(net).weights["0.weight"]
    net.to(dtype)
    assert net[0].weight.dtype == dtype
    torch.testing.assert_close(
        norms_of(net, 0, 2).float(),
        torch.full((8,), rho),
        rtol=2 * torch.finfo(dtype).eps + 1e-6,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_cast_to_half_keeps_rho_exact(net: nn.Sequential, form: str, dtype: torch.dtype) -> None:
    apply_weight_norm(net, p=1, **FORMS[form])
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    net.to(dtype).float()
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert net.double()[0].parametrizations.weight[0].rho.dtype == torch.float64


def test_load_with_another_p_fails(net: nn.Sequential) -> None:
    twin = copy.deepcopy(net)
    apply_weight_norm(net, p="inf")
    apply_weight_norm(twin)
    message = r"0\.parametrizations\.weight\.0 was normalised by L∞ there, here it is by L2"
    with pytest.raises(RuntimeError, match=message):
        twin.load_state_dict(net.state_dict())


def conv(fill: float | None = None) -> nn.Conv2d:
    """Return a convolution, of which one channel may hold one value."""
    made = nn.Conv2d(2, 4, 1)
    if fill is not None:
        nn.init.constant_(made.weight[1], fill)
    return made


def pruned() -> nn.Module:
    layer = conv()
    prune.random_unstructured(layer, "weight", 0.5)
    return nn.Sequential(nn.Conv2d(3, 2, 1), layer)


def with_weight(weight: Tensor) -> nn.Module:
    layer = conv().requires_grad_(False)
    layer.weight.data = weight
    return layer


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        return nn.Sequential(torch.jit.script(nn.Conv2d(2, 4, 1)))


def wrapped() -> nn.Module:
    layer = conv()
    apply_weight_norm(layer)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pruned, r"1\.weight is computed from 1\.weight_orig, .* exclude '1\.weight'"),
        (
            lambda: with_weight(torch.ones(4, 2, 1, 1).to(torch.float8_e4m3fn)),
            "weight is of torch.float8_e4m3fn, and only real floating-point",
        ),
        (scripted, "0.weight is in a module that is scripted"),
        (lambda: with_weight(torch.empty(4, 0, 1, 1)), "weight has no elements"),
        (lambda: "x", "model is a torch.nn.Module, got 'x'"),
        (lambda: conv(0.0), r"weight has 1 of 4 channels that are zero \(1\)"),
        (lambda: conv(math.nan), "values that are not finite"),
        (wrapped, "normalised already; remove_weight_norm reverts that"),
        (lambda: parametrizations.weight_norm(conv()), "parametrization already .*exclude"),
        (lambda: nn.Conv2d(2, 4, 1, dtype=torch.complex64), "torch.complex64"),
        (lambda: nn.Conv2d(2, 4, 1, device="meta"), "no values yet"),
        (lambda: nn.LazyConv2d(4, 1), "no values yet"),
        (lambda: nn.Linear(2, 4), "has no weight to normalise: layers is .*conv.*; choose .* It"),
        (nn.ReLU, "no weight to normalise"),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "is renormalised in place by max_norm=1"),
        (lambda: nn.Embedding(5, 3, sparse=True), "sparse"),
    ],
)
def test_apply_refuses_models(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    named = make is scripted or isinstance(model, nn.Embedding)
    with pytest.raises(InputError, match=message) as caught:
        apply_weight_norm(model, include=["*weight"] if named else [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 3}, "p is 1, 2 or inf, got 3"),
        ({"p": "two"}, "p is 1, 2 or inf, got 'two'"),
        ({"p": True}, "p is 1, 2 or inf, got True"),
        ({"kind": "bound"}, "kind is 'bounded' or 'weight', got 'bound'. Did you mean 'bounded'?"),
        ({"rho": 0}, "rho is 'init' or a positive number, got 0"),
        ({"rho": "first"}, "rho is 'init' or a positive number, got 'first'"),
        ({"gain": "layer"}, "gain of 'bounded' is 'none' or 'channel', got 'layer'"),
        ({"kind": "weight", "gain": "none"}, "gain of 'weight' is 'channel' or 'layer', got 'none"),
        ({"project": "no"}, "project is True or False, got 'no'"),
        ({"include": ["7.*"]}, r"'7.\*' matches no weight .* there is 0.weight, 2.weight,"),
        ({"exclude": ["*"]}, "no weight to normalise"),
        ({"kind": "weight", "optimizers": [None]}, "optimizers is an optimizer or a list of them,"),
        ({"kind": "weight", "optimizers": 3}, "optimizers is an optimizer or a list of them, got"),
    ],
)
def test_apply_refuses_settings(net: nn.Sequential, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_weight_norm(net, **options)
    assert not any("parametrizations" in name for name in net.state_dict())


@pytest.mark.parametrize(("rho", "dtype"), [(1e-60, torch.float32), (1e6, torch.float16)])
def test_apply_refuses_a_rho_out_of_the_dtypes_range(
    net: nn.Sequential, rho: float, dtype: torch.dtype
) -> None:
    with pytest.raises(InputError, match=f"of {dtype}, without the number rho = "):
        apply_weight_norm(net.to(dtype), rho=rho)


def test_apply_refuses_inference_mode(net: nn.Sequential) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inside torch"):
        apply_weight_norm(net)


@pytest.mark.usefixtures("_one_process")
def test_apply_refuses_a_ddp_model(net: nn.Sequential) -> None:
    with pytest.raises(InputError, match="wrapped by DistributedDataParallel already"):
        apply_weight_norm(nn.parallel.DistributedDataParallel(net))


def test_exclude_leaves_a_pruned_weight() -> None:
    net = pruned()
    assert list(apply_weight_norm(net, exclude=["1.weight_orig"]).weights) == ["0.weight"]


def test_remove_refuses_a_plain_model(net: nn.Sequential) -> None:
    with pytest.raises(InputError, match="Sequential has no normalised weight"):
        remove_weight_norm(net)

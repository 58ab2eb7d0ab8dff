"""Test swaps of other libraries' layer and RMS norms, and of classes that `types` names."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from nmlightning import swap_norms
from nmlightning.errors import InputError
from nmlightning.norms import L1BatchNorm2d, LpLayerNorm, LpRMSNorm
from nmlightning.surgery.checkpoints import swap_like


def hugging_face(path: str, *arguments: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("transformers.models")
        module, name = path.split(".")
        family = getattr(models, module)
        return getattr(getattr(family, f"modeling_{module}"), name)(*arguments)  # type: ignore[no-any-return]

    return make


class HardCoded(nn.Module):
    """An RMS norm of 1 + weight along (N, C, L), without an attribute for eps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x * (x.square().mean(1, True) + 1e-6).rsqrt()
        return y * (1 + self.weight.view(-1, 1))


class Unlike(HardCoded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Nowhere(HardCoded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Named(nn.Module):
    """A layer norm, or without a bias an RMS norm, along `dim`, under names of its own."""

    def __init__(self, weight: str, bias: str, shape: tuple[int, ...] = (8,), dim: int = -1):
        super().__init__()
        self.names, self.axis = (weight, bias), dim
        for name in filter(None, self.names):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, upcast: bool = True) -> Tensor:
        weight, bias = (getattr(self, name) if name else 0 for name in self.names)
        x = x if mask is None else x * mask
        if self.names[1]:
            x = x - x.mean(self.axis, True)
        return x * (x.square().mean(self.axis, True) + 1e-12).rsqrt() * weight + bias


class Lucid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(2, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * 8**0.5 * (self.gamma + 1)


class Batch(nn.BatchNorm2d):
    """A batch norm by hand, whose variance for evaluation is that of `bessel`."""

    bessel, factor = True, 1.0

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), unbiased=self.bessel)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
            var = x.var((0, 2, 3), unbiased=False)
        y = (x - mean.view(-1, 1, 1)) * (var.view(-1, 1, 1) + self.eps).rsqrt()
        return self.factor * y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Biased(Batch):
    bessel = False


class Doubled(Batch):
    factor = 2.0


class Split(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(3)
        self.aux = nn.BatchNorm2d(3)


class Noisy(HardCoded):
    """A norm that drops values in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Clamped(HardCoded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


class Counting(HardCoded):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training
        return super().forward(x)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKENS, IMAGES, SERIES = (2, 3, 8), (2, 8, 3, 4), (2, 8, 5)
NORMS: list[tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = [
    (lambda: timm.layers.LayerNorm(8), "layer", TOKENS),
    (lambda: timm.layers.LayerNorm(8, affine=False), "layer", TOKENS),
    (lambda: timm.layers.LayerNormFp32(8), "layer", TOKENS),
    (lambda: timm.layers.LayerNorm2d(8), "layer", IMAGES),
    (lambda: timm.layers.LayerNormAct(8, act_layer=nn.GELU), "layer", TOKENS),
    (lambda: timm.layers.LayerNormAct2d(8), "layer", IMAGES),
    (lambda: timm.layers.RmsNorm(8), "rms", TOKENS),
    (lambda: timm.layers.RmsNorm2d(8), "rms", IMAGES),
    (lambda: timm.layers.RmsNormAct(8), "rms", TOKENS),
    (lambda: torchvision.models.convnext.LayerNorm2d(8), "layer", IMAGES),
    (hugging_face("llama.LlamaRMSNorm", 8), "rms", TOKENS),
    (hugging_face("gemma2.Gemma2RMSNorm", 8), "rms", TOKENS),
    (hugging_face("t5.T5LayerNorm", 8), "rms", TOKENS),
    (hugging_face("llama4.Llama4TextL2Norm"), "rms", TOKENS),
    (hugging_face("nemotron.NemotronLayerNorm1P", 8), "layer", TOKENS),
    (hugging_face("cohere.CohereLayerNorm", (2, 8)), "layer", (5, 2, 8)),
    (hugging_face("olmo.OlmoLayerNorm", 8), "layer", TOKENS),
    (hugging_face("squeezebert.SqueezeBertLayerNorm", 8), "layer", SERIES),
    (HardCoded, "rms", SERIES),
    (lambda: Named("g", ""), "rms", TOKENS),
    (lambda: Named("gamma", "beta"), "layer", TOKENS),
    (lambda: Named("scale", "b", (1, 8, 1, 1), 1), "layer", IMAGES),
    (lambda: Named("g", "", (8, 1, 1), 1), "rms", IMAGES),
    (Lucid, "rms", (4, 2, 5, 8)),
]


@pytest.mark.parametrize(("make", "kind", "shape"), NORMS)
def test_p_2_equals_the_class_and_l2_gives_its_bits_back(
    make: Callable[[], nn.Module], kind: str, shape: tuple[int, ...]
) -> None:
    net = nn.Sequential(make())
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1)
    norm, own, x = net[0], type(net[0]), torch.randn(shape)
    state, expected = dict(vars(norm)), net(x)
    types = {f"{__name__}.{own.__name__}": kind} if own.__module__ == __name__ else {}
    for name, options in (("scaled", {}), ("lp", {"p": 2})):
        swap_norms(net, name, options, kinds=kind, types=types)
        types = {}  # a swapped class needs none
        assert isinstance(norm, own)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(norm, LpLayerNorm if kind == "layer" else LpRMSNorm)
    swap_norms(net, "L1", {"eps": 0.1}, kinds=kind)
    assert type(norm).__name__ == f"L1{own.__name__}"
    assert "eps=0.1" in repr(norm)
    y = net(x)
    assert (y - expected).abs().max() > 0.01
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), y)
    assert len(swap_norms(net, "l1", kinds=kind)) == 0
    swap_norms(net, "l1", {"eps": state.get("eps", 1e-6)}, kinds=kind)
    swap_norms(net, "l2", kinds=kind)
    assert type(norm) is own
    assert vars(norm).keys() == state.keys()


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_tiny_patch16_224", 25), ("deit_tiny_patch16_224", 25), ("convnext_atto", 17)],
)
def test_models_train_as_l1_and_are_reverted(name: str, count: int) -> None:
    net = timm.create_model(name, pretrained=False).eval()
    x, classes = torch.randn(1, 3, 224, 224), [type(module) for module in net.modules()]
    expected = net(x)
    assert len(swap_norms(net, "l1", kinds="layer")) == count
    net.train()(x).square().sum().backward()
    assert all(q.grad.isfinite().all() for q in net.parameters() if q.requires_grad)
    assert len(swap_norms(net, "l2", kinds="layer")) == count
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net.eval()(x), expected)


def test_half_input_is_normalised_in_float32() -> None:
    norm = hugging_face("gemma2.Gemma2RMSNorm", 8)().bfloat16()
    swap_norms(net := nn.Sequential(norm), "lp", {"p": 2}, kinds="rms")
    x = 1000 * torch.randn(2, 8).bfloat16()
    y = net(x)
    assert y.dtype == torch.bfloat16
    expected = nn.functional.rms_norm(x.double(), (8,)).bfloat16()
    torch.testing.assert_close(y, expected, rtol=4e-3, atol=4e-3)  # a rounding to bfloat16


@pytest.mark.parametrize("learned", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize(
    "make", [hugging_face(name, 8) for name in ("t5.T5LayerNorm", "llama.LlamaRMSNorm")]
)
def test_output_has_the_dtype_that_the_class_gives(
    make: Callable[[], nn.Module], given: torch.dtype, learned: torch.dtype
) -> None:
    net, x = nn.Sequential(make().to(learned)), torch.randn(2, 8, dtype=given)
    expected = net(x)
    swap_norms(net, "lp", {"p": 2.0}, kinds="rms")
    assert net(x).dtype == expected.dtype
    torch.testing.assert_close(net(x), expected, rtol=1e-2, atol=1e-2)


def test_class_is_known_on_the_meta_device() -> None:
    net = nn.Sequential(timm.layers.LayerNorm2d(8)).to("meta")
    assert len(swap_norms(net, "l1", kinds="layer")) == 1


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({f"{__name__}.Unlike": "rms"}, r"Unlike, but it does not compute an RMS norm: .* 1 off"),
        ({f"{__name__}.HardCoded": "layer"}, "HardCoded, but it does not compute a layer norm"),
        ({f"{__name__}.HardCodet": "rms"}, "no module is of that class. Did you mean '.*HardCoded"),
        ({f"{__name__}.HardCoded": "group"}, "is 'batch' or 'layer' or 'rms', got 'group'"),
        ({f"{__name__}.HardCoded": "batch"}, "HardCoded, but it is not a subclass of nn.BatchNo"),
        ({f"{__name__}.Nowhere": "rms"}, "RMS norm: it gives nothing finite of the input's shape"),
        ({f"{__name__}.Biased": "batch"}, "batch norm: its running_var in training is 0.* off"),
        ({f"{__name__}.Doubled": "batch"}, "batch norm: its output in training is 1 off"),
        ({f"{__name__}.Split": "batch"}, r"Split, but it has modules in it \(aux\)"),
        ({Noisy: "rms"}, "Noisy, but it does not compute an RMS norm in training: .* 1 off"),
        ({Clamped: "rms"}, "Clamped, but it does not compute an RMS norm of large values: .* off"),
        ({Counting: "rms"}, "Counting, but its forward changes count"),
        ({"HardCoded": "rms"}, f"that class. Name it '{__name__}.HardCoded', its full path"),
        ({3: "rms"}, "types maps classes or their paths"),
        ([f"{__name__}.HardCoded"], "types maps classes or their paths"),
    ],
)
def test_types_that_cannot_be_right_are_refused(types: dict[str, str], message: str) -> None:
    net = nn.Sequential(nn.RMSNorm(8), HardCoded(), Unlike(), Nowhere(), Split(), Noisy())
    net.extend([Biased(4), Doubled(4), Clamped(), Counting()])
    with pytest.raises(InputError, match=message):
        swap_norms(net, "l1", kinds=["rms", "layer"], types=types)


@pytest.mark.filterwarnings("error")
def test_class_is_a_key_and_trying_it_leaves_no_trace() -> None:
    norm = timm.layers.LayerNorm(8)
    net = nn.Sequential(norm, HardCoded())
    state = torch.get_rng_state()
    assert len(swap_norms(net, "l1", kinds=["layer", "rms"], types={HardCoded: "rms"})) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_norm_that_takes_a_gate_is_left() -> None:
    net = nn.Sequential(nn.RMSNorm(8), hugging_face("qwen3_next.Qwen3NextRMSNormGated", 8)())
    (left,) = swap_norms(net, "l1", kinds="rms").left
    assert left.reason == "its forward takes more than one input"


def test_batch_norm_of_ones_own_is_taken_if_it_computes_one() -> None:
    net, x = nn.Sequential(Batch(4), nn.ReLU(), Batch(4)), torch.randn(6, 4, 3, 5)
    with pytest.raises(InputError, match=f"name it by types={{'{__name__}.Batch': 'batch'}}"):
        swap_norms(net)
    twin = copy.deepcopy(net)
    assert len(swap_norms(net, "lp", {"p": 2}, types={f"{__name__}.Batch": "batch"})) == 2
    torch.testing.assert_close(net(x), twin(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)
    swap_norms(net, "l1", fuse="relu")  # a swapped class needs no types
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert isinstance(copied[0], Batch)
    assert isinstance(copied[0], L1BatchNorm2d)
    torch.testing.assert_close(copied.train()(x), net.train()(x))
    assert len(swap_like(twin, net.state_dict())) == 2
    swap_norms(net, "l2")
    assert type(net[0]) is Batch
    swap_norms(twin, "l2")
    assert vars(net[0]).keys() == vars(twin[0]).keys()


def test_norm_with_norms_in_it_is_left_as_a_whole() -> None:
    report = swap_norms(nn.Sequential(nn.BatchNorm2d(3), Split()))
    assert [(x.name, x.reason) for x in report.left] == [
        ("1", "a subclass with modules in it (aux)"),
        ("1.aux", "a part of 1 (Split), which is not swapped"),
    ]


def test_optional_argument_is_left_to_its_default() -> None:
    net = nn.Sequential(Named("g", ""))
    swap_norms(net, "l1", kinds="rms", types={f"{__name__}.Named": "rms"})
    x = torch.randn(2, 8)
    assert torch.equal(net[0](x), net[0](x=x, mask=None, upcast=True))
    with pytest.raises(InputError, match="L1Named normalises one input, and got mask as well"):
        net[0](x, torch.ones(8))

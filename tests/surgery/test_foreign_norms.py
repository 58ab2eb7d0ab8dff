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
from nmlightning.norms import LpLayerNorm, LpRMSNorm
from nmlightning.surgery.recipes import make_recipe


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


TOKENS, IMAGES, SERIES = (2, 3, 8), (2, 8, 3, 4), (2, 8, 5)
TYPES = {f"{__name__}.HardCoded": "rms"}
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
    types = TYPES if own is HardCoded else {}
    swap_norms(net, "lp", {"p": 2}, kinds=kind, types=types)
    assert isinstance(norm, own)
    assert isinstance(norm, LpLayerNorm if kind == "layer" else LpRMSNorm)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    swap_norms(net, "L1", {"eps": 0.1}, kinds=kind)  # a swapped class needs no types
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
def test_models_train_as_l1_and_are_undone(name: str, count: int) -> None:
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


@pytest.mark.parametrize("learned", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
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
        ({f"{__name__}.Unlike": "rms"}, r"Unlike, but it does not compute a RMS norm: .* 1 off"),
        ({f"{__name__}.HardCoded": "layer"}, "HardCoded, but it does not compute a layer norm"),
        ({f"{__name__}.HardCodet": "rms"}, "no module is of that class. Did you mean '.*HardCoded"),
        ({f"{__name__}.HardCoded": "batch"}, "is 'layer' or 'rms', got 'batch'"),
        ([f"{__name__}.HardCoded"], "types maps paths of classes"),
    ],
)
def test_types_that_cannot_be_right_are_refused(types: dict[str, str], message: str) -> None:
    net = nn.Sequential(nn.RMSNorm(8), HardCoded(), Unlike())
    with pytest.raises(InputError, match=message):
        swap_norms(net, "l1", kinds=["rms", "layer"], types=types)


def test_norm_that_takes_a_gate_is_left() -> None:
    net = nn.Sequential(nn.RMSNorm(8), hugging_face("qwen3_next.Qwen3NextRMSNormGated", 8)())
    (left,) = swap_norms(net, "l1", kinds="rms").left
    assert left.reason == "its forward takes more than one input"


def test_recipe_holds_the_types() -> None:
    assert make_recipe("L1", {}, "rms", (), (), TYPES)["types"] == TYPES
    assert "types" not in make_recipe("l1", {}, ("rms",), (), ())

"""The norms by name: each name's classes, and the error for a misspelt one."""

import re
from typing import Any

import pytest
from torch import nn

from nmlightning import norms
from nmlightning.errors import InputError
from nmlightning.kernels.interface import NormKind
from nmlightning.norms import registry

OURS = [name for name, norm in registry.NORMS.items() if norm.batch and name != "l2"]
OTHERWISE = {"top10": "TopK", "mean": "MeanOnly"}  # the other classes are called as the norms are


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("dims", "suffix"), [(None, ""), (1, "1d"), (2, "2d"), (3, "3d")])
def test_layer_class_finds_batch_norms(name: str, dims: int | None, suffix: str) -> None:
    cls = registry.layer_class(name, "batch", dims)
    called = OTHERWISE.get(name, name.replace("_", ""))
    assert cls.__name__.lower() == f"{called}BatchNorm{suffix}".lower()
    assert cls is getattr(norms, cls.__name__)
    layer = cls(3, **registry.check_options(name, "batch", {}))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("dims", [1, 2, 3, None])
def test_layer_class_is_torchs_for_l2(dims: int | None) -> None:
    expected = nn.SyncBatchNorm if dims is None else getattr(nn, f"BatchNorm{dims}d")
    assert registry.layer_class("l2", "batch", dims) is expected


@pytest.mark.parametrize(
    ("name", "home", "title"),
    [("l2", nn, ""), ("l1", norms, "L1"), ("lp", norms, "Lp"), ("scaled", norms, "Scaled")],
)
def test_layer_class_finds_layer_and_rms_norms(name: str, home: Any, title: str) -> None:
    assert registry.layer_class(name, "layer") is getattr(home, f"{title}LayerNorm")
    assert registry.layer_class(name, "rms") is getattr(home, f"{title}RMSNorm")


@pytest.mark.parametrize("name", ["linf", "topk", "top10", "range", "mean", "half_l2"])
@pytest.mark.parametrize(("kind", "title"), [("layer", "layer"), ("rms", "RMS")])
def test_layer_class_rejects_undefined_kinds(name: str, kind: NormKind, title: str) -> None:
    message = (
        f"The norm '{name}' is not defined for {title} norms; l2, l1, lp, scaled, dyt, derf are."
    )
    with pytest.raises(InputError, match=message):
        registry.layer_class(name, kind)
    with pytest.raises(InputError, match="'scaled' is not defined for batch norms; l2, l1, lp, li"):
        registry.layer_class("scaled", "batch", 2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *(("l_1", "l1"), ("top_10", "top10"), ("top-K", "topk"), ("l-inf", "linf")),
        *(("means", "mean"), ("group", ""), (None, ""), (1, "l1"), (["l1"], "l1")),
    ],
)
def test_find_norm_lists_the_names_and_suggests_the_nearest(name: Any, nearest: str) -> None:
    hint = f" Did you mean '{nearest}'?" if nearest else ""
    with pytest.raises(InputError) as error:
        registry.find_norm(name)
    assert (
        str(error.value)
        == f"There is no norm {name!r}; there are {', '.join(registry.NORMS)}.{hint}"
    )


def test_check_options_adds_the_fixed_ones() -> None:
    assert registry.check_options("top10", "batch", {}) == {"k": 10}
    assert registry.check_options("top10", "batch", {"eps": 1e-3}) == {"k": 10, "eps": 1e-3}
    given = {"p": 1.5, "constant": "none", "stats_dtype": "float64"}
    assert registry.check_options("lp", "layer", given) == given
    assert given == {"p": 1.5, "constant": "none", "stats_dtype": "float64"}


@pytest.mark.parametrize("name", OURS)
def test_check_options_takes_the_common_ones(name: str) -> None:
    options = {"eps": 1e-3, "momentum": 0.2, "sync": True}
    if name != "half_l2":
        options["stats_dtype"] = None
    if name not in ("mean", "half_l2"):
        options["constant"] = "none"
    assert registry.check_options(name, "batch", options).items() >= options.items()


@pytest.mark.parametrize(
    ("name", "kind", "option", "message"),
    [
        ("l1", "batch", "constnat", "no option 'constnat' for batch norms; it has constant, eps, "),
        ("l1", "batch", "constnat", "Did you mean 'constant'?"),
        ("l1", "batch", "p", "The norm 'l1' has no option 'p' for batch norms"),
        ("l1", "layer", "sync", "'sync' for layer norms; it has constant, eps, stats_dtype."),
        ("l1", "rms", "sync", "'sync' for RMS norms; it has constant, eps, stats_dtype."),
        ("mean", "batch", "constant", "'constant' for batch norms; it has eps, momentum, "),
        ("top10", "batch", "k", "The norm 'top10' has k = 10 by its name."),
        # What a layer takes from the one that it replaces is no option.
        ("l1", "batch", "affine", "no option 'affine'"),
        ("l1", "batch", "num_features", "no option 'num_features'"),
        ("lp", "layer", "bias", "no option 'bias'"),
        ("l1", "batch", 1, "no option 1 for batch norms"),
        ("l2", "batch", "process_group", "no option 'process_group'"),
    ],
)
def test_check_options_rejects_unknown_ones(
    name: str, kind: str, option: Any, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        registry.check_options(name, kind, {option: 1})


@pytest.mark.parametrize("options", [3, "k", [["k", 5]]])
def test_check_options_rejects_other_than_mappings(options: Any) -> None:
    message = f"options map names to values, such as {{'eps': 1e-5}}, got {options!r}."
    with pytest.raises(InputError, match=re.escape(message)):
        registry.check_options("topk", "batch", options)

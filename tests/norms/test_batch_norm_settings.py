"""The settings of batch norms: what is kept, printed and refused."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from batch_norm_contract import (
    Norm,
    each_kind,
    every_statistic,
)
from nmlightning import norms
from nmlightning.errors import InputError

SETTINGS: list[dict[str, Any]] = [
    {},
    {"eps": 1e-3},
    {"momentum": None},
    {"momentum": 0.25},
    {"affine": False},
    {"track_running_stats": False},
    {"constant": "paper"},
    {"constant": 0.75},
    {"stats_dtype": "float64"},
    {"stats_dtype": torch.float64},
    {"sync": True},
    {"eps": 0.0, "momentum": 1.0, "affine": False, "constant": "none", "sync": True},
]
ATTRIBUTES = "num_features eps momentum affine track_running_stats constant stats_dtype sync"


@every_statistic
def test_copies_behave_alike(norm: Norm) -> None:
    layer = norm.layer(constant=0.5, stats_dtype="float64", sync=True)
    x = torch.randn(4, 3, 2, 5)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        torch.testing.assert_close(other(x), copy.deepcopy(layer)(x), rtol=0, atol=0)


@every_statistic
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_repr_evaluates(norm: Norm, settings: dict[str, Any]) -> None:
    layer = norm.layer(**settings)
    again = eval(repr(layer), {**vars(norms), "torch": torch})
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    for name in [*ATTRIBUTES.split(), "statistic"]:
        assert getattr(again, name) == getattr(layer, name)
    for name, value in settings.items():
        expected = torch.float64 if name == "stats_dtype" else value
        assert getattr(layer, name) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1e-5}, "eps must be finite and at least 0, got -1e-05"),
        ({"eps": math.nan}, "eps must be finite and at least 0, got nan"),
        ({"eps": math.inf}, "eps must be finite and at least 0, got inf"),
        ({"momentum": 1.5}, "momentum must be between 0 and 1, or None, got 1.5"),
        ({"momentum": "fast"}, "momentum must be between 0 and 1, or None, got 'fast'"),
        ({"eps": "small"}, "eps must be finite and at least 0, got 'small'"),
        ({"constant": [1]}, r"constant must be a finite number above 0, got \[1\]"),
        ({"momentum": -0.1}, "momentum must be between 0 and 1, or None, got -0.1"),
        ({"momentum": math.nan}, "momentum must be between 0 and 1, or None, got nan"),
        ({"constant": "exakt"}, r"got 'exakt'\. Did you mean 'exact'\?"),
        ({"constant": 0.0}, "constant must be a finite number above 0, got 0.0"),
        ({"stats_dtype": "float46"}, r"got 'float46'\. Did you mean 'float64'\?"),
        ({"stats_dtype": "half"}, "one of float16, bfloat16, float32, float64, got 'half'"),
        ({"stats_dtype": torch.int32}, "float32, float64, got 'int32'"),
        ({"constant": True}, "constant must be a finite number above 0, got True"),
        ({"eps": False}, "eps must be finite and at least 0, got False"),
        ({"momentum": True}, "momentum must be between 0 and 1, or None, got True"),
        ({"sync": "no"}, "sync is True or False, got 'no'"),
        ({"affine": "no"}, "affine is True or False, got 'no'"),
        ({"bias": "no"}, "bias is True or False, got 'no'"),
        ({"track_running_stats": 2}, "track_running_stats is True or False, got 2"),
    ],
    ids=str,
)
@each_kind
def test_bad_settings(norm: Norm, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        norm.layer(**settings)


@pytest.mark.parametrize("p", [0.99, 0, -1, math.inf, math.nan, "2", True])
def test_bad_powers(p: Any) -> None:
    with pytest.raises(InputError, match=f"p must be finite and at least 1, got {p!r}"):
        norms.LpBatchNorm2d(3, p)


@pytest.mark.parametrize("k", [0, -1, 2.5, 10.0, "10", True, None])
def test_bad_counts(k: Any) -> None:
    with pytest.raises(InputError, match=f"k must be a whole number of at least 1, got {k!r}"):
        norms.TopKBatchNorm2d(3, k)


@pytest.mark.parametrize("constant", ["exact", "paper", "none", 0.5])
def test_more_of_the_largest_than_values(constant: Any) -> None:
    layer = norms.TopKBatchNorm2d(3, 10, constant=constant)
    with pytest.raises(InputError, match="k = 10 largest of n = 8 values a channel"):
        layer(torch.randn(2, 3, 2, 2))
    assert layer.num_batches_tracked == 0

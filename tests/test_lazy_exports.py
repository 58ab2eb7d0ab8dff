"""Test names that are imported when first used, and former module names."""

import pickle
from importlib import import_module

import pytest

import nmlightning
from nmlightning.lazy_exports import RENAMED


@pytest.mark.parametrize(
    "package", ["nmlightning", *(f"nmlightning.{x}" for x in ("models", "datamodules", "tasks"))]
)
def test_lazy_exports_lists_and_loads_every_name(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert {getattr(module, name).__name__ for name in module.__all__} == set(module.__all__)


def test_lazy_exports_refuse_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'nmlightning' has no attribute 'L3BatchNorm'"):
        nmlightning.L3BatchNorm  # noqa: B018


@pytest.mark.parametrize(("former", "now"), RENAMED.items())
def test_renamed_module_is_the_same_object(former: str, now: str) -> None:
    assert import_module(f"nmlightning.{former}") is import_module(f"nmlightning.{now}")


def test_pickle_of_a_former_path_loads() -> None:
    assert pickle.loads(b"cnmlightning.models.transformer\nTransformer\n.") is (
        import_module("nmlightning.models").Transformer
    )

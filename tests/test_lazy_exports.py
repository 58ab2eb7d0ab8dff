"""Public names: imported when first used, and also where they were before modules were moved."""

from importlib import import_module

import pytest

import nmlightning
from nmlightning.functional.statistics import PowerMean
from nmlightning.lazy_exports import RENAMED


@pytest.mark.parametrize("former", [*RENAMED, "weights.steering.step_hooks"])
def test_a_renamed_module_is_the_present_one(former: str) -> None:
    module = import_module(f"nmlightning.{former}")
    now = f"nmlightning.{RENAMED[former]}" if former in RENAMED else module.__name__
    assert module is import_module(now)


def test_a_renamed_package_has_no_other_modules() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        import_module("nmlightning.weights.steering.nothing")


def test_an_older_pickle_of_a_statistic_has_its_constant() -> None:
    statistic = PowerMean.__new__(PowerMean)
    statistic.__setstate__({"p": 1.0})
    assert statistic == PowerMean(1.0)
    assert statistic.constant(1, "exact") == pytest.approx(1.2533141)


@pytest.mark.parametrize(
    "package", ["nmlightning", *(f"nmlightning.{x}" for x in ("models", "datamodules", "tasks"))]
)
def test_lazy_exports_lists_and_loads_every_name(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert {getattr(module, name).__name__ for name in module.__all__} == set(module.__all__)


@pytest.mark.parametrize("package", ["models", "datamodules", "tasks"])
def test_nmlightning_has_what_its_packages_have(package: str) -> None:
    names = set(import_module(f"nmlightning.{package}").__all__)
    namespace: dict[str, object] = {}
    exec("from nmlightning import *", namespace)
    assert names <= namespace.keys() & set(dir(nmlightning))


def test_lazy_exports_refuse_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'nmlightning' has no attribute 'L3BatchNorm'"):
        nmlightning.L3BatchNorm  # noqa: B018

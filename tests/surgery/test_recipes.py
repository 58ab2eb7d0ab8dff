"""Test that recipes are plain data, in the order of the swaps, and that a difference is named."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from nmlightning.errors import InputError
from nmlightning.surgery.recipes import (
    NORM_SWAP,
    Recipe,
    changed_modules,
    check_recipes,
    make_recipe,
    note_recipe,
    recipes_in,
    recipes_of,
    write_recipes,
)


def recipe(norm: str = "l1", **options: Any) -> Recipe:
    return make_recipe(norm, options, ("batch",), (), ())


def checkpoint(*recipes: Recipe) -> dict[str, Any]:
    return {"nmlightning": {"version": 1, "norm_swaps": [{**r, "modules": {}} for r in recipes]}}


def module_with(*recipes: Recipe) -> nn.Module:
    module = nn.Module()
    for each in recipes:
        note_recipe(module, each, {"a": each["norm"]}, NORM_SWAP)
    return module


def test_a_recipe_is_what_json_can_hold() -> None:
    made = make_recipe(
        "topk",
        {"k": 3, "constant": "paper", "stats_dtype": torch.float64, "momentum": None},
        ("batch", "layer"),
        ("a.*",),
        (),
    )
    assert json.loads(json.dumps(made)) == made
    assert made["options"] == {
        "k": 3,
        "constant": "paper",
        "stats_dtype": "float64",
        "momentum": None,
    }


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (recipe("l1", constant="exact", stats_dtype=None), recipe("l1")),
        (recipe("topk", k=10), recipe("topk")),
        (recipe("lp", p=1), recipe("lp")),
        (recipe("mean", stats_dtype=None), recipe("mean")),
        (recipe("lp", p=1, stats_dtype="torch.float64"), recipe("lp", stats_dtype=torch.float64)),
        (
            make_recipe("l1", {}, ("layer", "batch"), ("b", "a"), ("d", "c")),
            make_recipe("l1", {}, ("batch", "layer"), ("a", "b", "a"), ("c", "d")),
        ),
    ],
)
def test_what_comes_to_the_same_is_the_same_recipe(given: Recipe, same: Recipe) -> None:
    assert given == same


@pytest.mark.parametrize("option", [{"eps": 1e-5}, {"momentum": 0.1}, {"sync": False}])
def test_what_is_otherwise_taken_from_the_layer_has_no_default(option: dict[str, Any]) -> None:
    assert recipe("l1", **option) != recipe("l1")


def test_a_checkpoint_whose_recipe_names_a_default_is_that_of_the_short_one() -> None:
    spelt_out = {**recipe("l1"), "options": {"constant": "exact"}}
    check_recipes(module_with(recipe("l1")), checkpoint(spelt_out))


def test_a_recipe_is_noted_once_and_remembers_all_its_modules() -> None:
    module = nn.Module()
    for modules in ({"a": "L1"}, {}, {"b": "L1"}):
        note_recipe(module, recipe(), modules, NORM_SWAP)
    assert recipes_of(module, NORM_SWAP) == [{**recipe(), "modules": {"a": "L1", "b": "L1"}}]


def test_a_recipe_that_is_followed_again_is_the_last() -> None:
    module = module_with(recipe("l1"), recipe("linf"))
    note_recipe(module, recipe("l1"), {}, NORM_SWAP)
    assert changed_modules(module, NORM_SWAP) == {"a": "linf"}
    note_recipe(module, recipe("l1"), {"a": "l1"}, NORM_SWAP)
    assert [r["norm"] for r in recipes_of(module, NORM_SWAP)] == ["l1"]
    assert changed_modules(module, NORM_SWAP) == {"a": "l1"}


@pytest.mark.parametrize(
    ("swaps", "shown"),
    [
        ([(recipe("l1"), "ab"), (recipe("linf"), "ab")], ["linf"]),
        ([(recipe("l1"), "ab"), (recipe("linf"), "a")], ["l1", "linf"]),
        ([(recipe("l1"), "ab"), (recipe("linf"), "a"), (recipe("topk"), "b")], ["linf", "topk"]),
        # The next norm takes over what the last one set of these.
        ([(recipe("l1", eps=0.1), "a"), (recipe("linf"), "a")], ["l1", "linf"]),
        # It found what it was to make, which is no reason to forget it.
        ([(recipe("l1"), ""), (recipe("linf"), "a")], ["l1", "linf"]),
    ],
)
def test_a_recipe_that_later_ones_undid_altogether_is_forgotten(
    swaps: list[tuple[Recipe, str]], shown: list[str]
) -> None:
    module = nn.Module()
    for each, modules in swaps:
        note_recipe(module, each, dict.fromkeys(modules, each["norm"]), NORM_SWAP)
    assert [r["norm"] for r in recipes_of(module, NORM_SWAP)] == shown
    entries = [{**each, "modules": dict.fromkeys(names, "")} for each, names in swaps]
    older = {"nmlightning": {"version": 1, "norm_swaps": entries}}
    assert [r["norm"] for r in recipes_in(older, NORM_SWAP)] == shown


def test_what_is_written_is_read() -> None:
    module, written = module_with(recipe("l1", eps=0.1), recipe("lp", p=3)), {"state_dict": {}}
    write_recipes(module, written)
    assert recipes_in(written, NORM_SWAP) == recipes_of(module, NORM_SWAP)
    check_recipes(module, written)


def test_a_module_that_was_not_swapped_writes_nothing_and_fits_a_plain_checkpoint() -> None:
    written: dict[str, Any] = {}
    write_recipes(nn.Module(), written)
    assert written == {}
    check_recipes(nn.Module(), written)


@pytest.mark.parametrize(
    ("there", "here", "answer"),
    [
        ([recipe("l1")], [recipe("linf")], "NormSwap norm = 'l1', this run has norm = 'linf'"),
        (
            [recipe("topk", k=3)],
            [recipe("topk", k=4)],
            "NormSwap options = {'k': 3}, this run has options = {'k': 4}",
        ),
        (
            [make_recipe("l1", {}, ("batch",), ("a",), ())],
            [make_recipe("l1", {}, ("batch", "layer"), ("a",), ())],
            "kinds = ['batch'], this run has kinds = ['batch', 'layer']",
        ),
        (
            [make_recipe("l1", {}, ("batch",), ("a",), ("b",))],
            [make_recipe("l1", {}, ("batch",), ("a",), ())],
            "exclude = ['b'], this run has exclude = []",
        ),
        ([recipe("l1"), recipe("linf")], [recipe("l1")], "'l1', 'linf', this run has 'l1'."),
        (
            [recipe("l1", eps=0.1), recipe("linf", eps=0.1)],
            [recipe("linf", eps=0.1), recipe("l1", eps=0.1)],
            "norm = 'l1', this run",
        ),
        ([], [recipe("l1")], "trained with no NormSwap, this run has 'l1'."),
        ([recipe("l1")], [], "NormSwap 'l1', this run has nothing (no NormSwap)."),
    ],
)
def test_another_recipe_is_refused(there: list[Recipe], here: list[Recipe], answer: str) -> None:
    with pytest.raises(InputError) as error:
        check_recipes(module_with(*here), checkpoint(*there))
    assert answer in str(error.value)
    assert "Resume with the same norms, or start from its weights" in str(error.value)


@pytest.mark.parametrize("version", [2, None])
def test_another_version_is_refused(version: int | None) -> None:
    entry = {"nmlightning": {"version": version, "norm_swaps": []}}
    with pytest.raises(InputError, match=f"version {version}, and this release reads 1: install"):
        recipes_in(entry, NORM_SWAP)

"""Test recipes as plain data in the order of the swaps, and actions after a method."""

import copy
import functools
import json
import pickle
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
    register_after,
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


def test_make_recipe_is_plain_data() -> None:
    options = {"k": 3, "constant": "paper", "stats_dtype": torch.float64, "momentum": None}
    made = make_recipe("topk", options, ("batch", "layer"), ("a.*",), ())
    assert json.loads(json.dumps(made)) == made
    assert made["options"] == {**options, "stats_dtype": "float64"}


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
def test_make_recipe_normalises_equal_settings(given: Recipe, same: Recipe) -> None:
    assert given == same


@pytest.mark.parametrize("option", [{"eps": 1e-5}, {"momentum": 0.1}, {"sync": False}])
def test_make_recipe_keeps_inherited_options(option: dict[str, Any]) -> None:
    assert recipe("l1", **option) != recipe("l1")


def test_check_recipes_accepts_a_spelt_out_default() -> None:
    spelt_out = {**recipe("l1"), "options": {"constant": "exact"}}
    check_recipes(module_with(recipe("l1")), checkpoint(spelt_out))


def test_note_recipe_joins_modules() -> None:
    module = nn.Module()
    for modules in ({"a": "L1"}, {}, {"b": "L1"}):
        note_recipe(module, recipe(), modules, NORM_SWAP)
    assert recipes_of(module, NORM_SWAP) == [{**recipe(), "modules": {"a": "L1", "b": "L1"}}]


def test_note_recipe_moves_a_repeated_recipe_last() -> None:
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
        ([(recipe("l1", eps=0.1), "ab"), (recipe("linf", eps=0.2), "ab")], ["linf"]),
        # It found what it was to make, which is no reason to forget it.
        ([(recipe("l1"), ""), (recipe("linf"), "a")], ["l1", "linf"]),
    ],
)
def test_overwritten_recipes_are_dropped(swaps: list[tuple[Recipe, str]], shown: list[str]) -> None:
    module = nn.Module()
    for each, modules in swaps:
        note_recipe(module, each, dict.fromkeys(modules, each["norm"]), NORM_SWAP)
    assert [r["norm"] for r in recipes_of(module, NORM_SWAP)] == shown
    entries = [{**each, "modules": dict.fromkeys(names, "")} for each, names in swaps]
    older = {"nmlightning": {"version": 1, "norm_swaps": entries}}
    assert [r["norm"] for r in recipes_in(older, NORM_SWAP)] == shown


def test_write_recipes_round_trips() -> None:
    module, written = module_with(recipe("l1", eps=0.1), recipe("lp", p=3)), {"state_dict": {}}
    write_recipes(module, written)
    assert recipes_in(written, NORM_SWAP) == recipes_of(module, NORM_SWAP)
    check_recipes(module, written)


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
            [recipe("l1", eps=0.1), recipe("linf", momentum=0.2)],
            [recipe("linf", momentum=0.2), recipe("l1", eps=0.1)],
            "norm = 'l1', this run",
        ),
        ([], [recipe("l1")], "trained with no NormSwap, this run has 'l1'."),
        ([recipe("l1")], [], "NormSwap 'l1', this run has nothing (no NormSwap)."),
    ],
)
def test_check_recipes_names_the_difference(
    there: list[Recipe], here: list[Recipe], answer: str
) -> None:
    with pytest.raises(InputError) as error:
        check_recipes(module_with(*here), checkpoint(*there))
    assert answer in str(error.value)
    assert "Resume with the same norms, or start from its weights" in str(error.value)


@pytest.mark.parametrize("version", [2, None])
def test_recipes_in_refuses_another_version(version: int | None) -> None:
    entry = {"nmlightning": {"version": version, "norm_swaps": []}}
    with pytest.raises(InputError, match=f"version {version}, and this release reads 1: install"):
        recipes_in(entry, NORM_SWAP)


class Greets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def greet(self, name: str) -> str:
        self.heard.append(f"hello {name}")
        return name.upper()


def note(module: Greets, word: str, name: str) -> None:
    module.heard.append(f"{word} {name}")


def test_register_after_calls_actions_with_the_arguments() -> None:
    module = Greets()
    register_after(module, "greet", functools.partial(note, module, "welcome"), key="a")
    register_after(module, "greet", functools.partial(note, module, "bye"), key="b")
    assert module.greet("you") == "YOU"
    assert module.heard == ["hello you", "welcome you", "bye you"]


def test_register_after_replaces_the_action_of_a_key() -> None:
    module = Greets()
    for word in ("bye", "welcome"):
        register_after(module, "greet", functools.partial(note, module, word), key="a")
    module.greet("you")
    assert module.heard == ["hello you", "welcome you"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_register_after_acts_on_the_copy(duplicate: Any) -> None:
    module = Greets()
    register_after(module, "greet", functools.partial(note, module, "welcome"), key="a")
    twin = duplicate(module)
    register_after(twin, "greet", functools.partial(note, twin, "bye"), key="b")
    twin.greet("you")
    assert module.heard == []
    assert twin.heard == ["hello you", "welcome you", "bye you"]
    module.greet("me")
    assert module.heard == ["hello me", "welcome me"]

"""Test recipes in checkpoints, also those of older releases, and actions after a method."""

import copy
import functools
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules import PlModule
from nmlightning import apply_weight_norm, swap_norms
from nmlightning.errors import InputError
from nmlightning.surgery import recipes
from nmlightning.surgery.checkpoints import _follow


def make(norm: str = "l2", **options: Any) -> Any:
    """Return a module that keeps its recipes, with two batch norms and a layer norm, `net.1`."""
    module = PlModule()
    module.net = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4), nn.BatchNorm2d(4))
    swap_norms(module, norm, options)
    recipes.keep_in_checkpoints(module)
    return module


def saved(module: nn.Module) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {}
    recipes.write_recipes(module, checkpoint)
    return checkpoint


def older(*swaps: tuple[str, dict[str, Any], str], kinds: Any = ("batch",)) -> dict[str, Any]:
    """Return a checkpoint as version 1 wrote it of swaps: the norm, its options, which of `net`."""
    rest = {"kinds": list(kinds), "include": [], "exclude": []}
    names = {"0": "L1BatchNorm2d", "1": "L1LayerNorm", "2": "L1BatchNorm2d"}
    made = [{f"net.{x}": names[x] for x in places} for *_, places in swaps]
    entries = [
        {"norm": norm, "options": options, **rest, "modules": modules}
        for (norm, options, _), modules in zip(swaps, made, strict=True)
    ]
    return {"nmlightning": {"version": 1, "norm_swaps": entries}}


def test_recipes_are_plain_data_of_all_norms() -> None:
    checkpoint = saved(make("topk", k=3, stats_dtype=torch.float64, momentum=None))
    assert json.loads(json.dumps(checkpoint)) == checkpoint
    assert list(checkpoint["nmlightning"]["norms"]) == ["net.0", "net.1", "net.2"]
    note = {"norm": "LayerNorm", "options": {"eps": 1e-5}}
    assert checkpoint["nmlightning"]["norms"]["net.1"] == note
    assert saved(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("sync", [False, True])
def test_resume_may_set_what_is_of_the_model(sync: bool) -> None:
    recipes.check_recipes(make("l1"), saved(make("l1", eps=0.1, momentum=None, sync=sync)))
    recipes.check_recipes(make("l2"), saved(make("l2", eps=0.1)))


@pytest.mark.parametrize(
    ("there", "here", "answer"),
    [
        (make("l1"), make("linf"), "norm = 'l1' on net.0, this run has norm = 'linf'."),
        (make("topk", k=3), make("top10"), "k = 3 on net.0, this run has k = 10."),
        (make(), make("l1"), "norm = 'l2' on net.0, this run has norm = 'l1'."),
        (make("l1"), make(), "norm = 'l1' on net.0, this run has norm = 'l2'."),
    ],
)
def test_check_recipes_names_the_difference(there: Any, here: Any, answer: str) -> None:
    for checkpoint in (saved(there), {"state_dict": there.state_dict()}):
        with pytest.raises(InputError) as error:
            recipes.check_recipes(here, checkpoint)
        assert str(error.value).startswith(f"The checkpoint was trained with {answer} Resume with")
        assert "with the same NormSwap, or start from its weights" in str(error.value)
        recipes.check_recipes(there, checkpoint)


def test_checkpoint_that_says_nothing_is_refused_where_recipes_are_kept() -> None:
    """Sharded ones have no metadata, and norms may be those of the model itself."""
    module = make("l1")
    with pytest.raises(InputError, match=r"norm = 'l2' on net\.0, this run has norm = 'l1'"):
        recipes.check_recipes(module, {"state_dict": {}})
    recipes.check_recipes(module.net, {"state_dict": {}})


def test_tied_weight_is_the_same_under_either_name() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    net[1].weight = net[0].weight
    apply_weight_norm(net, p="inf", include=["0.weight"])
    assert recipes.recipe_in(saved(net), recipes.WEIGHTS)["0.weight"]["p"] == math.inf
    for checkpoint in (saved(net), {"state_dict": net.state_dict()}):
        recipes.check_recipes(net, checkpoint)


@pytest.mark.parametrize(
    ("swaps", "options"),
    [
        ([("l1", {}, "02")], {}),
        ([("linf", {}, "02"), ("l1", {"constant": "exact"}, "0"), ("l1", {}, "2")], {}),
        ([("topk", {"eps": 0.1}, "02"), ("l1", {}, "02")], {"eps": 0.1}),
    ],
)
def test_older_checkpoint_is_followed_and_compared(swaps: Any, options: dict[str, Any]) -> None:
    module, checkpoint = make(), older(*swaps)
    recipes.check_recipes(make("l1"), checkpoint)
    with pytest.raises(InputError, match=r"norm = 'l1' on net\.0, this run has norm = 'topk'"):
        recipes.check_recipes(make("top10"), checkpoint)
    _follow(module, recipes.recipe_in(checkpoint, recipes.NORMS))
    assert repr(module) == repr(make("l1", **options))


def test_older_checkpoint_of_layer_norms_and_a_swap_back_is_followed() -> None:
    module = make("linf")
    swaps = [("l1", {}, "012"), ("l2", {"eps": 0.5}, "02")]
    _follow(module, recipes.recipe_in(older(*swaps, kinds=("batch", "layer")), recipes.NORMS))
    assert [type(x).__name__ for x in module.net] == ["BatchNorm2d", "L1LayerNorm", "BatchNorm2d"]
    assert [x.eps for x in module.net if isinstance(x, _BatchNorm)] == [0.5, 0.5]


@pytest.mark.parametrize("version", [3, None])
def test_recipe_in_refuses_another_version(version: int | None) -> None:
    with pytest.raises(InputError, match=f"version {version}, and this release reads 1 and 2: in"):
        recipes.recipe_in({"nmlightning": {"version": version, "norms": {}}}, recipes.NORMS)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (7, recipes.NORMS, "is a int: damaged"),
        ({"version": 2, "int8": [3]}, recipes.INT8, "its int8 are unreadable"),
        ({"version": 2, "norms": {"a": 1}}, recipes.NORMS, "its norms are unreadable"),
        ({"version": 1, "norm_swaps": [{"norm": "l1"}]}, recipes.NORMS, "its norms are unreadable"),
        (
            {"version": 1, "weight_norms": [{"modules": {}}]},
            recipes.WEIGHTS,
            "its weights are unreadable",
        ),
    ],
)
def test_recipe_in_refuses_a_damaged_entry(entry: Any, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=f"'nmlightning' entry {message}|{message}"):
        recipes.recipe_in({"nmlightning": entry}, kind)


class Greets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def greet(self, name: str) -> str:
        self.heard.append(f"hello {name}")
        return name.upper()


def note(module: Greets, word: str, name: str) -> None:
    module.heard.append(f"{word} {name}")


def test_register_after_calls_the_latest_action_of_each_key() -> None:
    module = Greets()
    for word, key in (("hi", "a"), ("welcome", "a"), ("bye", "b")):
        recipes.register_after(module, "greet", functools.partial(note, module, word), key=key)
    assert module.greet("you") == "YOU"
    assert module.heard == ["hello you", "welcome you", "bye you"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_register_after_acts_on_the_copy(duplicate: Any) -> None:
    module = Greets()
    recipes.register_after(module, "greet", functools.partial(note, module, "welcome"), key="a")
    twin = duplicate(module)
    recipes.register_after(twin, "greet", functools.partial(note, twin, "bye"), key="b")
    twin.greet("you")
    assert module.heard == []
    assert twin.heard == ["hello you", "welcome you", "bye you"]
    module.greet("me")
    assert module.heard == ["hello me", "welcome me"]

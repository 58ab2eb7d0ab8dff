"""Test that actions follow a method, once a key, in every copy of a module too."""

import copy
import functools
import pickle
from typing import Any

import pytest
from torch import nn

from nmlightning.surgery.recipes import register_after


class Greets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def greet(self, name: str) -> str:
        self.heard.append(f"hello {name}")
        return name.upper()


def note(module: Greets, word: str, name: str) -> None:
    module.heard.append(f"{word} {name}")


def test_actions_follow_the_method_with_its_arguments() -> None:
    module = Greets()
    register_after(module, "greet", functools.partial(note, module, "welcome"), key="a")
    register_after(module, "greet", functools.partial(note, module, "bye"), key="b")
    assert module.greet("you") == "YOU"
    assert module.heard == ["hello you", "welcome you", "bye you"]


def test_the_latest_action_of_a_key_replaces_the_others() -> None:
    module = Greets()
    for word in ("bye", "welcome"):
        register_after(module, "greet", functools.partial(note, module, word), key="a")
    module.greet("you")
    assert module.heard == ["hello you", "welcome you"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_acts_on_itself(duplicate: Any) -> None:
    module = Greets()
    register_after(module, "greet", functools.partial(note, module, "welcome"), key="a")
    twin = duplicate(module)
    register_after(twin, "greet", functools.partial(note, twin, "bye"), key="b")
    twin.greet("you")
    assert module.heard == []
    assert twin.heard == ["hello you", "welcome you", "bye you"]
    module.greet("me")
    assert module.heard == ["hello me", "welcome me"]

"""Call something after a method of one module, in every copy of that module too."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ACTIONS = "_nmlightning_actions"


def run_after(module: nn.Module, method: str, action: Callable[..., Any], key: str) -> None:
    """Make this instance call `action`, with the same arguments, after its `method`.

    Of the actions with one `key` only the latest is called. Partials of bound methods pickle and
    copy with the module; closures would not.
    """
    of_methods = module.__dict__.setdefault(_ACTIONS, {})
    if method not in of_methods:
        of_methods[method] = {}
        call_all = functools.partial(_call_all, getattr(module, method), of_methods[method])
        setattr(module, method, call_all)
    of_methods[method][key] = action


def _call_all(
    original: Callable[..., Any], actions: dict[str, Callable[..., Any]], *args: Any, **kwargs: Any
) -> Any:
    result = original(*args, **kwargs)
    for action in actions.values():
        action(*args, **kwargs)
    return result

"""The class that a module has while its norms do the ReLUs of its forward, and the way back.

The module stays the same object, as when its norms are swapped: with the same state, parameters and
hooks. Its class becomes a subclass of its own, of the same name, that differs in `forward`; it
copies and pickles, since what the class is made of does.
"""

import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import new_class
from typing import Any

from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.kernels.interface import Fused
from nmlightning.surgery.fuse.patterns import Code
from nmlightning.surgery.norm_act import own_activation
from nmlightning.surgery.norm_layers import FUSION


@dataclass(frozen=True)
class Fusion:
    original: type[nn.Module]  # the class that the module had
    norms: tuple[tuple[str, Fused], ...]  # what each fused norm does, by its name in the module
    # The attributes that the forward depends on; setting another unfuses it.
    watched: frozenset[str]
    code: Code | None = None  # of the forward, None for that of a Sequential


def fusion_of(module: nn.Module) -> Fusion | None:
    """Return what the class of a module was made of, if it is a fused one."""
    return getattr(type(module), FUSION, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has when it is not fused."""
    fusion = fusion_of(module)
    return type(module) if fusion is None else fusion.original


def fuse_block(module: nn.Module, fusion: Fusion) -> None:
    """Make a module, which is not fused, what `fusion` says."""
    for name, fused in fusion.norms:
        vars(module.get_submodule(name))["fused"] = fused
    module.__class__ = fused_class(fusion)


def check_class(module: nn.Module) -> None:
    """Raise InputError if a fused module has become of another class since."""
    fusion = fusion_of(module)
    if fusion is not None and type(module) is not fused_class(fusion):
        raise InputError(
            f"{fusion.original.__name__} with fused norms has become {type(module).__name__} "
            "since, so the norms cannot be unfused: do that before it is sharded or "
            "parametrized."
        )


def unfuse_block(module: nn.Module) -> None:
    """Give a fused module its own class back, and let its norms only normalise."""
    fusion = fusion_of(module)
    assert fusion is not None, "the caller has looked"
    check_class(module)
    norms = [module.get_submodule(name) for name, _ in fusion.norms]
    if fusion.code is None:  # the children of a Sequential may have other names by now
        norms = [child for child in module.children() if own_activation(child) is None]
    for norm in norms:
        vars(norm).pop("fused", None)
    module.__class__ = fusion.original


@cache
def fused_class(fusion: Fusion) -> type[nn.Module]:
    """Return the class of all modules that were made of an equal fusion."""
    original = fusion.original
    members = {
        "__module__": original.__module__,
        # By its path jsonargparse leaves it out, which offers all subclasses to configs.
        "__qualname__": f"_Fused.{original.__qualname__}",
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _refuse_script,
        "__setattr__": _after_check(original.__setattr__),
        "__delattr__": _after_check(original.__delattr__),
        "add_module": _after_check(original.add_module),
        "forward": _compile(fusion.code) if fusion.code else _call_in_turn(dict(fusion.norms)),
        FUSION: fusion,
    }
    return new_class(original.__name__, (original,), exec_body=lambda body: body.update(members))


def is_reducible(cls: type[nn.Module]) -> bool:
    """Return whether objects of a class are copied and pickled as objects are."""
    return (cls.__reduce_ex__, cls.__reduce__) == (object.__reduce_ex__, object.__reduce__)


def _compile(code: Code) -> Callable[..., Any]:
    modules = {name: import_module(module) for name, module in code.modules}
    names: dict[str, Any] = {**modules, **dict(code.names)}
    exec(compile(code.source, "<forward with fused norms>", "exec"), names)
    forward: Callable[..., Any] = names["forward"]
    return forward


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle an object of a class that no import finds."""
    return (_make, (fusion_of(self),), *object.__reduce_ex__(self, protocol)[2:])


def _refuse_script(self: nn.Module) -> None:
    raise InputError(
        f"torch.jit.script cannot compile {type(self).__name__} with fused norms: call swap_norms "
        "without fuse first."
    )


def _make(fusion: Fusion) -> Any:
    cls = fused_class(fusion)
    return cls.__new__(cls)


def _after_check(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that unfuses the module before it changes what the forward depends on."""

    def checked(self: nn.Module, name: str, *value: Any) -> Any:
        fusion = fusion_of(self)
        if fusion is not None and name in fusion.watched and _differs(self, name, *value):
            unfuse_block(self)
            warnings.warn(
                f"{name} of {type(self).__name__} was changed, on which its fused norms depend: "
                "they are no longer fused. Call swap_norms with fuse to fuse them again.",
                stacklevel=2,
            )
        return change(self, name, *value)

    return checked


def _differs(module: nn.Module, name: str, *value: Any) -> bool:
    if not value or not hasattr(module, name):
        return not value  # a new object, such as a slice, gets its attributes
    (new,), old = value, getattr(module, name)
    plain = isinstance(new, bool | int | float | str) and type(new) is type(old)
    return not (new is old or (plain and new == old))


def _call_in_turn(norms: Container[str]) -> Callable[..., Any]:
    """Return the forward of a Sequential in which each of the norms does the ReLU behind it.

    It follows what the Sequential holds when it is called, which may be a slice of what it held.
    """

    def forward(self: nn.Module, input: Tensor) -> Any:
        done = ""
        for name, module in self._modules.items():
            if done and type(module) is nn.ReLU:
                done = ""
            elif not (done and type(module) is nn.Identity):
                _check_order(done)
                input = module(input)  # type: ignore[misc]
                done = name if name in norms and getattr(module, "fused", None) else ""
        _check_order(done)
        return input

    return forward


def _check_order(norm: str) -> None:
    if norm:
        raise InputError(
            f"The norm {norm} of a Sequential is fused with a ReLU that no longer follows it: add "
            "and remove modules before swap_norms fuses."
        )

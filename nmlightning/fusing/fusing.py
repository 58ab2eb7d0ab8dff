"""Have the norms of a model do what follows them, as planned, and take them apart again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from nmlightning.fusing.fused_class import (
    Fusion,
    check_class,
    fusion_of,
    put_together,
    take_apart,
)
from nmlightning.fusing.plan import FusingPlan
from nmlightning.norms.kernels.job import Fused
from nmlightning.swappable import let_activate, own_activation


def fused_of(norm: nn.Module) -> Fused | None:
    """Return what a norm does besides."""
    fused: Fused | None = vars(norm).get("fused")
    return fused


def fused_norms(model: nn.Module) -> dict[nn.Module, Fused]:
    """Return the norms of a model that do more than normalise, and what."""
    found = {module: fused_of(module) for module in model.modules()}
    return {norm: fused for norm, fused in found.items() if fused is not None}


def check_plan(model: nn.Module, plan: FusingPlan) -> None:
    """Raise InputError if a module is not to stay fused as it is, and cannot be taken apart."""
    for module, fusion in _fused_modules(model):
        if plan.fusions.get(module) != fusion:
            check_class(module)


def make_room(model: nn.Module, plan: FusingPlan) -> None:
    """Take apart what is not to stay fused as it is."""
    for module, fusion in _fused_modules(model):
        if plan.fusions.get(module) != fusion:
            take_apart(module)
    for norm in _self_fused(model):
        if plan.fused.get(norm) is None:
            _leave_to_hook(norm)


def carry_out(plan: FusingPlan) -> None:
    """Fuse what is planned and is not fused yet."""
    for module, fusion in plan.fusions.items():
        if fusion_of(module) is None:
            put_together(module, fusion)
    for norm, fused in plan.fused.items():
        if fused is not None and own_activation(norm) is not None and fused_of(norm) is None:
            _take_from_hook(norm)


def unfuse(model: nn.Module) -> None:
    """Let every norm of a model only normalise, and what follows it do the rest, in place.

    Raises:
        InputError: a module that has become of another class since; nothing is changed then.
    """
    check_plan(model, FusingPlan())
    make_room(model, FusingPlan())


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within it, every norm of a model only normalises; after it, they are fused as they were."""
    fusions, own = _fused_modules(model), _self_fused(model)
    unfuse(model)
    try:
        yield
    finally:
        for module, fusion in fusions:
            put_together(module, fusion)
        for norm in own:
            _take_from_hook(norm)


def _fused_modules(model: nn.Module) -> list[tuple[nn.Module, Fusion]]:
    found = ((module, fusion_of(module)) for module in model.modules())
    return [(module, fusion) for module, fusion in found if fusion is not None]


def _self_fused(model: nn.Module) -> list[nn.Module]:
    """Return the norms that do their own activation."""
    return [norm for norm in fused_norms(model) if own_activation(norm) is not None]


def _take_from_hook(norm: nn.Module) -> None:
    let_activate(norm, itself=True)
    vars(norm)["fused"] = "relu"


def _leave_to_hook(norm: nn.Module) -> None:
    let_activate(norm, itself=False)
    del vars(norm)["fused"]

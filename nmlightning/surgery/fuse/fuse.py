"""Fuses the ReLU, or the addition and the ReLU, behind a norm into it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from nmlightning.kernels.interface import Fused
from nmlightning.surgery.fuse import fused_class
from nmlightning.surgery.fuse.patterns import find_patterns, is_relu, rewrite
from nmlightning.surgery.fuse.trace import trace_block
from nmlightning.surgery.norm_act import own_activation
from nmlightning.surgery.norm_layers import fused_of, has_hooks

Callers = dict[nn.Module, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class FusingPlan:
    """The fused modules and norms that a model shall have, and why some norms only normalise."""

    # Of every module whose norms do what follows them in its forward.
    fusions: dict[nn.Module, fused_class.Fusion] = field(default_factory=dict)
    # What each norm does, None for nothing more.
    fused: dict[nn.Module, Fused | None] = field(default_factory=dict)
    # Why it does less than it was wanted to, of those of which that is so.
    reasons: dict[nn.Module, str] = field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Raise InputError if a module is not to stay fused as it is, and cannot be unfused."""
        for module in self._changed(model):
            fused_class.check_class(module)

    def unfuse_changed(self, model: nn.Module) -> None:
        """Unfuse what is not to stay fused as it is."""
        for module in self._changed(model):
            fused_class.unfuse_block(module)
        for norm in _self_fused(model):
            if self.fused.get(norm) is None:
                del vars(norm)["fused"]

    def apply(self) -> None:
        for module, fusion in self.fusions.items():
            if fused_class.fusion_of(module) is None:
                fused_class.fuse_block(module, fusion)
        for norm, fused in self.fused.items():
            if fused is not None and own_activation(norm) is not None and fused_of(norm) is None:
                vars(norm)["fused"] = "relu"

    def _changed(self, model: nn.Module) -> list[nn.Module]:
        return [m for m, fusion in _fused_modules(model) if self.fusions.get(m) != fusion]


def plan_fusing(model: nn.Module, wanted: Mapping[nn.Module, Fused | None]) -> FusingPlan:
    """Return how norms can do of what follows them as much as is `wanted` of each, and no more."""
    plan = FusingPlan()
    callers = _find_callers(model)
    blocks: dict[nn.Module, dict[str, Fused]] = {}
    for norm, most in wanted.items():
        plan.fused[norm] = None
        if most is None:
            continue
        if own_activation(norm) is not None:
            _plan_own_activation(plan, norm)
        elif has_hooks(norm):
            plan.reasons[norm] = "it has hooks"
        elif len(callers.get(norm, ())) != 1:
            names = ", ".join(name for _, name in callers.get(norm, ()))
            plan.reasons[norm] = f"it is used as {names}" if names else "no module calls it"
        else:
            ((module, name),) = callers[norm]
            blocks.setdefault(module, {})[name] = most
    for module, norms in blocks.items():
        _plan_block(plan, module, norms)
    return plan


def _find_callers(model: nn.Module) -> Callers:
    """Return which modules hold each module, itself or in lists and the like, and its name there.

    What has no forward, such as `nn.ModuleList`, counts as a part of what holds it.
    """
    callers: Callers = {}
    for module in model.modules():
        if not _is_container(module):
            for name, child in _children(module):
                callers.setdefault(child, []).append((module, name))
    return callers


def _children(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in module._modules.items():
        if child is not None:
            found.append((prefix + name, child))
            if _is_container(child):
                found += _children(child, f"{prefix}{name}.")
    return found


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _plan_own_activation(plan: FusingPlan, norm: nn.Module) -> None:
    """Plan for timm's norm that activates, which needs no module around it for that."""
    activation = own_activation(norm)
    assert activation is not None, "the caller has looked"
    if not is_relu(activation):
        plan.reasons[norm] = f"its own activation is {type(activation).__name__}"
    elif has_hooks(norm) or has_hooks(activation):
        plan.reasons[norm] = "it or its activation has hooks"
    else:
        plan.fused[norm] = "relu"


def _plan_block(plan: FusingPlan, module: nn.Module, most: Mapping[str, Fused]) -> None:
    """Plan for a module whose own forward calls norms, given the most that each may do."""
    original = fused_class.original_class(module)
    plan_norms = _fuse_in_turn if original.forward is nn.Sequential.forward else _fuse_traced
    if "forward" in vars(module):
        found: fused_class.Fusion | str = "its forward was replaced on the object"
    elif not fused_class.is_reducible(original):
        found = "it copies and pickles in a way of its own"
    else:
        found, reasons = plan_norms(module, original, most)
    if isinstance(found, str):
        reasons = dict.fromkeys(most, f"in {original.__name__}: {found}")
    elif found.norms:
        plan.fusions[module] = found
        plan.fused.update((module.get_submodule(name), fused) for name, fused in found.norms)
    plan.reasons.update((module.get_submodule(name), reason) for name, reason in reasons.items())


def _fuse_in_turn(
    module: nn.Module, original: type[nn.Module], most: Mapping[str, Fused]
) -> tuple[fused_class.Fusion, dict[str, str]]:
    """Return the fusion of a Sequential's norms before a ReLU, and why others are left."""
    fused: list[str] = []
    reasons: dict[str, str] = {}
    watched: set[str] = set()
    children = list(module._modules.items())
    for name in most:
        rest = children[[n for n, _ in children].index(name) + 1 :]
        end = next((i for i, (_, x) in enumerate(rest) if type(x) is not nn.Identity), None)
        after = None if end is None else rest[end][1]
        if end is None:
            reasons[name] = "it is the last of its Sequential"
        elif not is_relu(after):
            reasons[name] = f"{type(after).__name__} follows it"
        elif any(has_hooks(x) for _, x in rest[: end + 1] if x is not None):
            reasons[name] = "the ReLU after it has hooks"
        else:
            fused.append(name)
            watched |= {name, *(n for n, _ in rest[: end + 1])}
    return fused_class.Fusion(
        original, tuple((name, "relu") for name in fused), frozenset(watched)
    ), reasons


def _fuse_traced(
    module: nn.Module, original: type[nn.Module], most: Mapping[str, Fused]
) -> tuple[fused_class.Fusion | str, dict[str, str]]:
    """Return the fusion of the norms that a forward calls, and why others are left."""
    trace = trace_block(module, original)
    if isinstance(trace, str):
        return trace, {}
    found, reasons = find_patterns(trace.traced, most)
    norms = tuple((name, pattern.fused) for name, pattern in found.items())
    taken = {str(n.target) for pattern in found.values() for n in pattern.taken}
    watched = frozenset(name.split(".")[0] for name in (*trace.read, *found, *taken))
    return fused_class.Fusion(
        original, norms, watched, rewrite(trace.traced, found.values())
    ), reasons


def fused_norms(model: nn.Module) -> dict[nn.Module, Fused]:
    """Return the norms of a model that do more than normalise, and what."""
    found = {module: fused_of(module) for module in model.modules()}
    return {norm: fused for norm, fused in found.items() if fused is not None}


def unfuse(model: nn.Module) -> None:
    """Let every norm of a model only normalise, and what follows it do the rest, in place."""
    FusingPlan().check(model)
    FusingPlan().unfuse_changed(model)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within it, every norm of a model only normalises; after it, they are fused as they were."""
    fusions, own = _fused_modules(model), _self_fused(model)
    unfuse(model)
    try:
        yield
    finally:
        for module, fusion in fusions:
            fused_class.fuse_block(module, fusion)
        for norm in own:
            vars(norm)["fused"] = "relu"


def _fused_modules(model: nn.Module) -> list[tuple[nn.Module, fused_class.Fusion]]:
    found = ((module, fused_class.fusion_of(module)) for module in model.modules())
    return [(module, fusion) for module, fusion in found if fusion is not None]


def _self_fused(model: nn.Module) -> list[nn.Module]:
    return [norm for norm in fused_norms(model) if own_activation(norm) is not None]

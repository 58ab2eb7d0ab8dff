"""Fuses the ReLU, or the addition and the ReLU, behind a norm into it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from nmlightning.kernels.interface import Fused
from nmlightning.surgery.fuse.fused_class import (
    Fusion,
    check_class,
    fuse_block,
    fusion_of,
    is_reducible,
    original_class,
    unfuse_block,
)
from nmlightning.surgery.fuse.patterns import find_patterns, is_relu, rewrite
from nmlightning.surgery.fuse.trace import trace_block
from nmlightning.surgery.norm_layers import (
    fused_of,
    has_hooks,
    own_activation,
    set_fused_activation,
)

Callers = dict[nn.Module, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class FusingPlan:
    """What the modules and the norms of a model shall be, and why some norms only normalise.

    Attributes:
        fusions: of every module whose norms do what follows them in its forward.
        fused: what each norm does, None for nothing more.
        reasons: why it does less than it was wanted to, of those of which that is so.
    """

    fusions: dict[nn.Module, Fusion] = field(default_factory=dict)
    fused: dict[nn.Module, Fused | None] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Raise InputError if a module is not to stay fused as it is, and cannot be unfused."""
        for module in self._changed(model):
            check_class(module)

    def unfuse_changed(self, model: nn.Module) -> None:
        """Unfuse what is not to stay fused as it is."""
        for module in self._changed(model):
            unfuse_block(module)
        for norm in _self_fused(model):
            if self.fused.get(norm) is None:
                _leave_to_hook(norm)

    def apply(self) -> None:
        """Fuse what is planned and is not fused yet."""
        for module, fusion in self.fusions.items():
            if fusion_of(module) is None:
                fuse_block(module, fusion)
        for norm, fused in self.fused.items():
            if fused is not None and own_activation(norm) is not None and fused_of(norm) is None:
                _take_from_hook(norm)

    def _changed(self, model: nn.Module) -> list[nn.Module]:
        return [m for m, fusion in _fused_modules(model) if self.fusions.get(m) != fusion]


def plan_fusing(model: nn.Module, wanted: Mapping[nn.Module, Fused | None]) -> FusingPlan:
    """Return how norms can do of what follows them as much as is wanted of each, and no more.

    Args:
        model: is neither changed nor run.
        wanted: the most that each norm may do. Those that are left out stay as they are.
    """
    plan = FusingPlan()
    callers = _find_callers(model)
    blocks: dict[nn.Module, dict[str, nn.Module]] = {}
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
            blocks.setdefault(module, {})[name] = norm
    for module, norms in blocks.items():
        _plan_block(plan, module, {name: (norm, wanted[norm]) for name, norm in norms.items()})
    return plan


def _find_callers(model: nn.Module) -> Callers:
    """Return which modules hold each module, itself or in lists and the like, and its name there.

    What has no forward, such as `nn.ModuleList`, is taken for a part of what holds it.
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


def _plan_block(
    plan: FusingPlan, module: nn.Module, norms: Mapping[str, tuple[nn.Module, Fused | None]]
) -> None:
    original = original_class(module)
    most = {name: fused for name, (_, fused) in norms.items() if fused is not None}
    fused: dict[str, Fused] = {}
    reason = _refuse_block(module, original)
    if reason:
        refused = dict.fromkeys(most, f"in {original.__name__}: {reason}")
    elif original.forward is nn.Sequential.forward:
        fused, refused = _fuse_in_turn(module, most)
        if fused:
            plan.fusions[module] = Fusion(original, tuple(fused.items()), _names(module, fused))
    else:
        fused, refused = _fuse_traced(plan, module, original, most)
    for name, (norm, _) in norms.items():
        plan.fused[norm] = fused.get(name)
        if name in refused:
            plan.reasons[norm] = refused[name]


def _refuse_block(module: nn.Module, original: type[nn.Module]) -> str:
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    return "" if is_reducible(original) else "it copies and pickles in a way of its own"


def _names(module: nn.Module, norms: Mapping[str, Fused]) -> frozenset[str]:
    """Return the names of a Sequential's fused norms, and of the ReLUs after them."""
    names, watched = list(module._modules), set(norms)
    for norm in norms:
        after = names[names.index(norm) + 1 :]
        watched.update(
            after[: 1 + next(i for i, n in enumerate(after) if _child_is_relu(module, n))]
        )
    return frozenset(watched)


def _child_is_relu(module: nn.Module, name: str) -> bool:
    child = module._modules[name]
    return child is not None and is_relu(child)


def _fuse_in_turn(
    module: nn.Module, most: Mapping[str, Fused]
) -> tuple[dict[str, Fused], dict[str, str]]:
    """Return which norms of a Sequential have a ReLU behind them, and why not the others."""
    fused: dict[str, Fused] = {}
    refused: dict[str, str] = {}
    names = list(module._modules)
    for name in most:
        rest = [module._modules[n] for n in names[names.index(name) + 1 :]]
        after = next((child for child in rest if type(child) is not nn.Identity), None)
        if after is None:
            refused[name] = "it is the last of its Sequential"
        elif not is_relu(after):
            refused[name] = f"{type(after).__name__} follows it"
        elif any(has_hooks(c) for c in rest[: rest.index(after) + 1] if c is not None):
            refused[name] = "the ReLU after it has hooks"
        else:
            fused[name] = "relu"
    return fused, refused


def _fuse_traced(
    plan: FusingPlan, module: nn.Module, original: type[nn.Module], most: Mapping[str, Fused]
) -> tuple[dict[str, Fused], dict[str, str]]:
    trace = trace_block(module, original)
    if isinstance(trace, str):
        return {}, dict.fromkeys(most, f"in {original.__name__}: {trace}")
    found, refused = find_patterns(trace.traced, most)
    fused: dict[str, Fused] = {name: pattern.fused for name, pattern in found.items()}
    if fused:
        taken = {str(n.target) for pattern in found.values() for n in pattern.taken}
        watched = {name.split(".")[0] for name in (*trace.read, *fused, *taken)}
        code = rewrite(trace.traced, found.values())
        plan.fusions[module] = Fusion(original, tuple(fused.items()), frozenset(watched), code)
    return fused, refused


def fused_norms(model: nn.Module) -> dict[nn.Module, Fused]:
    """Return the norms of a model that do more than normalise, and what."""
    found = {module: fused_of(module) for module in model.modules()}
    return {norm: fused for norm, fused in found.items() if fused is not None}


def unfuse(model: nn.Module) -> None:
    """Let every norm of a model only normalise, and what follows it do the rest, in place.

    Raises:
        InputError: a module that has become of another class since; nothing is changed then.
    """
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
            fuse_block(module, fusion)
        for norm in own:
            _take_from_hook(norm)


def _fused_modules(model: nn.Module) -> list[tuple[nn.Module, Fusion]]:
    found = ((module, fusion_of(module)) for module in model.modules())
    return [(module, fusion) for module, fusion in found if fusion is not None]


def _self_fused(model: nn.Module) -> list[nn.Module]:
    """Return the norms that do their own activation."""
    return [norm for norm in fused_norms(model) if own_activation(norm) is not None]


def _take_from_hook(norm: nn.Module) -> None:
    set_fused_activation(norm, itself=True)
    vars(norm)["fused"] = "relu"


def _leave_to_hook(norm: nn.Module) -> None:
    set_fused_activation(norm, itself=False)
    del vars(norm)["fused"]

"""Swaps the norm layers of a model that exists already: plan, replace, report."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nmlightning.errors import InputError, check_flag, check_lists, nearest
from nmlightning.kernels.interface import Fused, NormKind
from nmlightning.name_patterns import by_reason, matches, some, unmatched
from nmlightning.norms import registry
from nmlightning.norms.fast_path import guard_encoders
from nmlightning.reports.formatting import Grid, Report
from nmlightning.surgery.foreign_norms import make_foreign
from nmlightning.surgery.lightning_hooks import watch_loading
from nmlightning.surgery.norm_layers import (
    NormLayer,
    class_to_take,
    convert_in_place,
    find_norm_layers,
    fused_of,
    has_fused,
    is_like,
    watch_other_code,
    whole_or_not_at_all,
)
from nmlightning.weights.channel_norms import is_sharded

if TYPE_CHECKING:
    from nmlightning.surgery.fuse.fuse import FusingPlan


_FUSED_WORDS = {
    "relu": "with the ReLU after them",
    "add_relu": "with the addition and the ReLU after them",
}


@dataclass(frozen=True)
class Swap:
    """One line of a report: the module's name, what it was, what it is, and why if it was left."""

    name: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True, repr=False)
class SwapReport(Report):
    """The modules that `swap_norms` swapped, or would swap, and the norms that it did not.

    Likewise the norms that it fused, unfused and could not fuse. rich prints it as a table, `print`
    as a line and one for each reason.
    """

    swapped: tuple[Swap, ...]
    left: tuple[Swap, ...]
    dry_run: bool = False
    fused: tuple[Swap, ...] = ()
    not_fused: tuple[Swap, ...] = ()

    def __len__(self) -> int:
        return len(self.swapped)

    def describe(self) -> str:
        """Return the counts, and a line for each reason why norms were not swapped or fused."""
        reasons = {
            fate: by_reason({swap.name: swap.reason for swap in swaps}, 2)
            for fate, swaps in (("not swapped", self.left), ("not fused", self.not_fused))
        }
        lines = [f"{fate} {line}" for fate, lines in reasons.items() for line in lines]
        return "\n".join([self._counts(), *lines])

    def _counts(self) -> str:
        kinds = Counter((swap.before, swap.after) for swap in self.swapped)
        counts = [f"{count} {before} → {after}" for (before, after), count in kinds.items()]
        left = f"; {len(self.left)} not swapped" if self.left else ""
        swapped = ("would swap " if self.dry_run else "swapped ") + (", ".join(counts) or "0")
        return swapped + left + self._fused()

    def _fused(self) -> str:
        kinds = Counter(swap.after for swap in self.fused)
        unfused = kinds.pop("", 0)
        counts = [f"{count} {_FUSED_WORDS[after]}" for after, count in kinds.items()]
        if counts:
            counts[0] = ("would fuse " if self.dry_run else "fused ") + counts[0]
        if unfused:
            counts.append(f"{'would unfuse' if self.dry_run else 'unfused'} {unfused}")
        if self.not_fused:
            counts.append(f"{len(self.not_fused)} not fused")
        return f"; {', '.join(counts)}" if counts else ""

    def __rich__(self) -> Grid:
        rows = [
            (swap.name, swap.before, swap.after or f"not swapped: {swap.reason}")
            for swap in (*self.swapped, *self.left)
        ]
        for swap in (*self.fused, *self.not_fused):
            does = f"fused {_FUSED_WORDS[swap.after]}" if swap.after else "not fused"
            rows.append((swap.name, swap.before, f"{does}: {swap.reason}" if swap.reason else does))
        return Grid(("module", "from", "to"), rows, self._counts())


def swap_norms(
    model: nn.Module,
    norm: str = "l1",
    options: Mapping[str, Any] | None = None,
    *,
    kinds: Sequence[str] | str = ("batch",),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    fuse: str | None = None,
    types: Mapping[Any, str] | None = None,
    dry_run: bool = False,
) -> SwapReport:
    """Swap the norm layers of `model` for the norm called `norm`, in place, and report it.

    A swapped layer stays the same object and changes its class, so its parameters, buffers and
    hooks, the optimizers that hold them, and all that shares the module stay valid. Swapped are
    torch's `BatchNorm1d/2d/3d`, `SyncBatchNorm` (which becomes a synchronised norm), `LayerNorm`
    and `RMSNorm`, our norms, timm's `BatchNormAct2d` (which becomes a class of both, such as
    `L1BatchNormAct2d`), and layer and RMS norms of timm, torchvision, Hugging Face and others that
    equal torch's on random inputs but for the axis, 1 + weight or an activation. Subclasses are
    not. A second call changes nothing, and `norm="l2"` reverts a swap. A swap to `mean`, which has
    no scale, makes the weights 1 and freezes them. If anything fails, nothing is changed.

    With `fuse` a batch norm also does the ReLU that alone follows it in its module's forward, in
    one kernel. The calling module gets a class of its own with another forward. Results differ by
    rounding. Hooks added to such a norm later see the activated output, those of its ReLU nothing.

    Args:
        model: any module, also one that `torch.compile` wraps.
        norm: `l1`, `linf`, `top10`, `topk`, `lp`, `range`, `mean`, `half_l2`, `scaled`,
            `dyt`, `derf`, or `l2`, what it was.
        options: the norm's constructor options: `k`, `p`, `chunks`, `constant`, `eps`, `momentum`,
            `stats_dtype`, `sync`. By default eps and momentum stay those of the layer.
        kinds: `batch`, `layer`, `rms` or several.
        include: glob patterns on module names, such as `layer1.*`; empty means all.
        exclude: glob patterns on names of modules that are not swapped.
        fuse: "relu" lets these batch norms do the ReLU after them, "add_relu" also an addition
            and the ReLU after that; None unfuses them.
        types: other classes that are "layer", "rms" or, of torch's subclasses, "batch" norms, by
            class or path, as `{"my.package.MyNorm": "rms"}`; they are tried on random inputs.
        dry_run: report only.

    Returns:
        A report of the norm layers that were swapped, and of the others with the reason.

    Raises:
        InputError: an unknown norm, kind or option; a pattern that matches nothing; nothing to
            swap in the model; a norm that `include` names but that cannot be swapped (group
            and instance norms, subclasses and unknown classes, objects with a forward of their
            own); a class in `types` that is not in the model or computes something else;
            parameters that are sharded already; `fuse` with "l2", which is torch's own, or without
            batch norms. The model is then unchanged.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(swap_norms(net, "top10", {"constant": "paper"}))
        swapped 1 BatchNorm2d → TopKBatchNorm2d
    """
    norm = registry.norm_name(norm)
    check_flag("dry_run", dry_run)
    check_lists(include=include, exclude=exclude)
    chosen = registry.check_kinds(kinds)
    settings = {kind: registry.check_options(norm, kind, options or {}) for kind in chosen}
    extent = registry.check_fuse(fuse, norm, chosen)
    layers = find_norm_layers(model, paths := registry.check_types(types))
    _check_types(model, layers, paths)
    picked = _pick(model, layers, chosen, include, exclude)
    plan = _make_plan(norm, settings, picked)
    swapped = tuple(
        Swap(x.name, x.type_name, class_to_take(x.module, template).__name__)
        for x, template in plan
    )
    unsupported = [x for x in picked if x.unsupported_reason]
    left = tuple(Swap(x.name, x.type_name, "", x.unsupported_reason) for x in unsupported)
    fusing = _plan_fusing(model, picked, extent)
    fused, not_fused = _list_fused(picked, fusing)
    if not dry_run:
        with whole_or_not_at_all(model, [x.module for x in picked if x.kind is not None]):
            if fusing is not None:
                fusing.unfuse_changed(model)
            _convert(plan)
            if fusing is not None:
                fusing.apply()
            if any(x.kind != "batch" for x in picked):
                guard_encoders(model.modules())
        watch_other_code()
        if "nmlightning.compat" not in sys.modules:  # it watches from the start
            watch_loading()
    return SwapReport(swapped, left, dry_run, fused, not_fused)


def _plan_fusing(
    model: nn.Module, picked: Iterable[NormLayer], fuse: Fused | None
) -> FusingPlan | None:
    """Return what the norms that are picked and those that are fused already do afterwards.

    None if fusing is not asked for and nothing is fused: such a swap needs none of that code.
    """
    if fuse is None and not has_fused(model):
        return None
    from nmlightning.surgery.fuse.fuse import fused_norms, plan_fusing

    wanted: dict[nn.Module, Fused | None] = {**fused_norms(model)}
    wanted |= {x.module: fuse for x in picked if x.kind == "batch"}
    plan = plan_fusing(model, wanted)
    plan.check(model)
    return plan


def _list_fused(
    picked: Iterable[NormLayer], plan: FusingPlan | None
) -> tuple[tuple[Swap, ...], tuple[Swap, ...]]:
    """Return the norms that will do something else than they do, and those that cannot."""
    if plan is None:
        return (), ()
    norms = [x for x in picked if x.module in plan.fused]
    changes = tuple(
        Swap(x.name, fused_of(x.module) or "", plan.fused[x.module] or "")
        for x in norms
        if fused_of(x.module) != plan.fused[x.module]
    )
    not_fused = [x for x in norms if x.module in plan.reasons]
    return changes, tuple(Swap(x.name, "", "", plan.reasons[x.module]) for x in not_fused)


def _make_plan(
    norm: str, settings: Mapping[NormKind, Mapping[str, Any]], layers: Iterable[NormLayer]
) -> list[tuple[NormLayer, nn.Module]]:
    """Return the layers that are not yet what they shall become, each with a template of that."""
    plan = []
    for layer in layers:
        if layer.kind is not None and layer.kind in settings:
            template = _template(layer, norm, settings[layer.kind])
            if not is_like(layer.module, template):
                parameters = layer.module.parameters(recurse=False)
                if any(type(q) is not nn.Parameter and is_sharded(q) for q in parameters):
                    raise InputError(
                        f"{layer.name} is sharded already: call swap_norms in configure_model, "
                        "before fully_shard."
                    )
                plan.append((layer, template))
    return plan


def _convert(plan: list[tuple[NormLayer, nn.Module]]) -> None:
    for layer, template in {id(x.module): (x, template) for x, template in plan}.values():
        try:
            convert_in_place(layer.module, template)
        except RuntimeError as error:  # such as of an inference tensor
            raise InputError(
                f"{layer.name} cannot become {type(template).__name__}: "
                f"{str(error).partition('.')[0]}. Clone its tensors first, or exclude it."
            ) from error


def _template(layer: NormLayer, norm: str, options: Mapping[str, Any]) -> nn.Module:
    """Return a new layer, without storage, that is what `layer` shall become."""
    assert layer.kind is not None, "others are not planned"
    settings = {**layer.inherited(), **options}
    dims = layer.dims
    if layer.synchronised and norm == "l2":
        dims = None
    elif layer.synchronised:
        settings.setdefault("sync", True)
    try:
        template = registry.layer_class(norm, layer.kind, dims)(**settings, device="meta")
    except InputError as error:
        if settings.get("num_features", 1) > 0:
            raise
        raise InputError(f"{layer.name} has no channels: exclude it. {error}") from error
    if layer.form is not None:
        has_eps = "eps" in options or "eps" in vars(layer.module)
        make_foreign(template, layer.module, layer.form, has_eps)
    return template


def _pick(
    model: nn.Module,
    layers: list[NormLayer],
    kinds: tuple[NormKind, ...],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[NormLayer]:
    """Return the layers to swap; a shared one is left alone if `exclude` names it anywhere."""
    wanted = f"{' or '.join(registry.TITLES[kind] for kind in kinds)} norm"
    name, held = type(model).__name__, f"Its norm layers are {some(map(_describe, layers), 3)}."
    if not layers:
        held = "It has no norm layers; is the net built in configure_model?"
    if not any(layer.kind in kinds for layer in layers):
        others = list(dict.fromkeys(x.kind for x in layers if x.kind is not None))
        way_out = f" Swap them with kinds={json.dumps(others)}." if others else ""
        raise InputError(f"There is no {wanted} to swap in {name}. {held}{way_out}")
    candidates = [x.name for x in layers if x.kind in kinds or x.unsupported_reason]
    # To exclude a norm that is not swapped anyway is right, if needless.
    known = {"include": candidates, "exclude": [layer.name for layer in layers]}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if (wrong := unmatched(patterns, known[argument])) is not None:
            problem = f"The pattern {wrong!r} in {argument} matches no {wanted} of {name}."
            raise InputError(f"{problem} {held}")
    excluded = {id(layer.module) for layer in layers if matches(layer.name, exclude)}
    included = [layer for layer in layers if not include or matches(layer.name, include)]
    picked = [layer for layer in included if id(layer.module) not in excluded]
    unsupported = [layer for layer in picked if layer.unsupported_reason]
    if include and unsupported:
        named = some(map(_describe, unsupported), 3)
        raise InputError(f"include names norms that cannot be swapped: {named}; exclude them.")
    if not any(layer.kind in kinds for layer in picked):
        raise InputError(f"include and exclude leave no {wanted} to swap in {name}. {held}")
    return picked


def _describe(layer: NormLayer) -> str:
    reason = f": {layer.unsupported_reason}" if layer.unsupported_reason else ""
    return f"{layer.name} ({layer.type_name}{reason})"


def _check_types(model: nn.Module, layers: list[NormLayer], types: Iterable[str]) -> None:
    classes = [getattr(x, "replaced", type(x)) for x in model.modules()]
    paths = {registry.path_of(cls): "" for cls in classes}
    paths |= {registry.path_of(type(x.module)): x.unsupported_reason for x in layers}
    for path in types:
        if path not in paths:
            full = next((x for x in paths if x.endswith(f".{path}")), None)
            near = f" Name it {full!r}, its full path." if full else nearest(path, paths)
            raise InputError(f"types names {path}, and no module is of that class.{near}")
        if paths[path]:
            raise InputError(f"types names {path}, but {paths[path]}.")

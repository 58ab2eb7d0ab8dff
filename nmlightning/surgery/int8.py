"""Swaps the convolutions, linear layers and batch norms of a model for int8, and back."""

from collections.abc import Mapping, Sequence
from glob import escape
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import InputError, check_flag, check_lists
from nmlightning.int8.layers import (
    INT8_CLASSES,
    Int8Layer,
    Int8Linear,
    WeightGradient,
    WeightRange,
    class_of,
    find_layers,
)
from nmlightning.int8.norms import quantize_norm, quantizer_of, restore_norm
from nmlightning.int8.quantizer import Rounding
from nmlightning.int8.ranges import options_of
from nmlightning.name_patterns import by_reason, matches, plain_name, some, unmatched
from nmlightning.norms.batch_norm_base import describe_norm
from nmlightning.norms.fast_path import guard_encoders
from nmlightning.norms.registry import check_options
from nmlightning.parametrizations.apply import unshare_class
from nmlightning.surgery.lightning_hooks import watch_loading
from nmlightning.surgery.norm_layers import find_norm_layers, fused_of
from nmlightning.surgery.recipes import Note, keep_in_checkpoints
from nmlightning.surgery.swap import Swap, SwapReport, swap_norms
from nmlightning.weights.channel_norms import is_flat, is_sharded

_FLOAT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    int8: plain for plain, int8 in INT8_CLASSES.items()
}


class Candidate(NamedTuple):
    """A layer or batch norm under one of its names, and the reason if it cannot be swapped."""

    name: str
    module: nn.Module
    is_norm: bool
    reason: str

    def is_so(self, options: Mapping[str, Any]) -> bool:
        """Return whether it computes in int8 with such options, synchronised or not."""
        now = options_of(self.module)
        asked = ((name, value) for name, value in options.items() if name != "sync")
        known = self.is_norm or isinstance(self.module, Int8Layer)
        return bool(known and now) and all(now.get(name, value) == value for name, value in asked)


def swap_int8(
    model: nn.Module, bits: int = 8, gradient_bits: int = 8, rounding: Rounding = "stochastic",
    bifurcate: bool = True, weight_gradient: WeightGradient = "float32", *,
    include: Sequence[str] = (), exclude: Sequence[str] = (), norms: str | None = "range",
    weight_range: WeightRange = "tensor", momentum: float | None = 0.1, sync: bool = False,
    dry_run: bool = False,
) -> SwapReport:  # fmt: skip
    """Let the convolutions and linear layers of `model` compute in int8, in place, and report it.

    A layer stays the same object and changes its class, see `Int8Layer`, so its parameters and
    hooks, the optimizers that hold them, and all that shares the module stay valid; the running
    range of its input joins its buffers. Options not listed below are those of `Int8Layer.set_up`.
    Batch norms get a quantised input and gradient, see `quantize_norm`. A second call sets the
    options anew and keeps the ranges; `remove_int8` reverts it. If anything is wrong, nothing is
    changed.

    Swapped are torch's `Conv1d/2d/3d`, also grouped and depthwise, and `Linear`, also with tied or
    parametrized weights: the first convolution and the output layer, too. Left, and reported with
    the reason, are transposed convolutions, subclasses, and what reads its weights itself, such as
    recurrent layers and torch's attention.

    Args:
        model: any module that is not sharded yet.
        include: glob patterns on the names of layers and batch norms; empty means all.
        exclude: glob patterns on the names of those that stay in floating point.
        norms: what torch's own batch norms become, by its name in `swap_norms`; "range" with the
            constant "official". Batch norms of this package stay what they are. All are quantised.
            None leaves norms alone.
        dry_run: only report.

    Raises:
        InputError: a setting that is not allowed; a pattern that matches nothing; no layer to swap;
            sharded weights; a batch norm that does more than normalise, by `swap_norms(fuse=…)`.

    Source: Banner et al. 2018 (arXiv 1805.11046).

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> print(swap_int8(net, gradient_bits=4))
        swapped 1 Conv2d → Int8Conv2d, 1 BatchNorm2d → quantised RangeBatchNorm2d
    """
    options = {
        "bits": bits, "gradient_bits": gradient_bits, "rounding": rounding,
        "bifurcate": bifurcate, "weight_gradient": weight_gradient,
        "weight_range": weight_range, "momentum": momentum, "sync": sync,
    }  # fmt: skip
    check_settings(options, norms)
    check_flag("dry_run", dry_run)
    check_lists(include=include, exclude=exclude)
    picked = _pick(model, include, exclude, norms)
    chosen = [x for x in picked if not x.reason]
    before = {x.name: _title(x.module) for x in picked}
    torchs = [x.name for x in chosen if x.is_norm and describe_norm(x.module) is None]
    taken: dict[str, str] = {}  # the classes of norms
    if torchs and norms is not None:
        names = [escape(name) for name in torchs]
        report = swap_norms(model, norms, _norm_options(norms), include=names, dry_run=dry_run)
        taken = {swap.name: swap.after for swap in report.swapped}
    due = [x for x in chosen if x.name in taken or not x.is_so(options)]
    swapped = tuple(
        Swap(x.name, *_with_changes(x.module, before[x.name], _title_to_be(x, taken), options))
        for x in due
    )
    if not dry_run:
        for x in chosen:
            if x.is_norm:
                made = describe_norm(x.module) if x.name in taken else None
                quantize_norm(x.module, bits, gradient_bits, rounding, momentum, sync, made)
            else:
                _become_int8(x.module, options)
        guard_encoders(model.modules())
        keep_in_checkpoints(model)
        watch_loading()
    left = tuple(Swap(x.name, before[x.name], "", x.reason) for x in picked if x.reason)
    return SwapReport(swapped, left, dry_run)


def remove_int8(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> SwapReport:
    """Let what `swap_int8` swapped compute in floating point again, and report it.

    Classes are torch's again, also those of the batch norms that were, and the ranges are gone;
    parameters stay as they are.

    Args:
        model: it is changed in place.
        include: glob patterns on the names of layers and batch norms; empty means all in int8.
        exclude: glob patterns on the names of those that stay in int8.

    Raises:
        InputError: a pattern that matches nothing; nothing in int8; sharded weights. The model is
            then unchanged.
    """
    check_lists(include=include, exclude=exclude)
    found = [x for x in _find(model, norms="range") if options_of(x.module)]
    chosen = _choose(model, found, include, exclude, "layer in int8")
    before = {x.name: _title(x.module) for x in chosen}
    were_torchs = []
    for x in chosen:
        if isinstance(x.module, Int8Layer) and any(map(is_sharded, x.module.parameters())):
            raise InputError(f"{x.name} is sharded: call remove_int8 before fully_shard.")
        made = options_of(x.module).get("swapped_to")
        were_torchs += [escape(x.name)] * (made is not None and made == describe_norm(x.module))
    if were_torchs:
        swap_norms(model, "l2", include=were_torchs)  # first, as it may refuse
    for module in dict.fromkeys(x.module for x in chosen):
        if isinstance(module, Int8Layer):
            module.forget_options()
            unshare_class(module, _FLOAT_CLASSES[class_of(module)])
        else:
            restore_norm(module)
    guard_encoders(model.modules())
    rows = (Swap(x.name, before[x.name], _title(x.module)) for x in chosen)
    return SwapReport(tuple(rows), ())


def check_settings(options: Mapping[str, Any], norms: str | None) -> None:
    """Raise InputError for a setting that `swap_int8` does not allow."""
    Int8Linear(1, 1, device="meta", **options)
    if norms is not None:
        check_options(norms, "batch", _norm_options(norms))


def follow_notes(model: nn.Module, notes: Mapping[str, Note]) -> tuple[Swap, ...]:
    """Let layers and norms, by name, compute in int8 as `describe_int8` said of them."""
    layers = {plain_name(name): x for name, x in model.named_modules(remove_duplicate=False)}
    rows = []
    for name in [
        name for name in notes if name in layers and options_of(layers[name]) != notes[name]
    ]:
        layer, note = layers[name], dict(notes[name])
        before = _title(layer)
        if "swapped_to" not in note and class_of(layer) in {*INT8_CLASSES, *_FLOAT_CLASSES}:
            _become_int8(layer, note)
        else:
            quantize_norm(layer, **note)
        rows.append(Swap(name, before, _title(layer)))
    guard_encoders(model.modules())
    return tuple(rows)


def _norm_options(norm: str) -> dict[str, Any]:
    return {"constant": "official"} if norm == "range" else {}


def _title(module: nn.Module) -> str:
    """Return what a report calls a module."""
    return "quantised " * (quantizer_of(module) is not None) + type(module).__name__


def _title_to_be(x: Candidate, norms: Mapping[str, str]) -> str:
    own = class_of(x.module)
    name = INT8_CLASSES.get(own, own).__name__
    return f"quantised {norms.get(x.name, name)}" if x.is_norm else name


def _with_changes(
    module: nn.Module, before: str, after: str, options: Mapping[str, Any]
) -> tuple[str, str]:
    """Return both titles, each with its own of the options that will change."""
    now = options_of(module)
    names = [k for k in now if k not in ("sync", "swapped_to") and options.get(k, now[k]) != now[k]]
    old, new = (", ".join(f"{name}={x[name]!r}" for name in names) for x in (now, options))
    return (f"{before}({old})", f"{after}({new})") if names else (before, after)


def _become_int8(module: nn.Module, options: Mapping[str, Any]) -> None:
    if quantizer_of(module) is not None:  # it quantised its input as a norm does
        restore_norm(module)
    if not isinstance(module, Int8Layer):
        unshare_class(module, INT8_CLASSES[class_of(module)])
    assert isinstance(module, Int8Layer)
    module.set_up(**options)


def _pick(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], norms: str | None
) -> list[Candidate]:
    picked = _choose(model, _find(model, norms), include, exclude, "convolution or linear layer")
    left = [x for x in picked if x.reason]
    if include and left:
        named = some([f"{x.name} ({x.reason})" for x in left], 3)
        raise InputError(
            f"include names layers that cannot compute in int8: {named}; exclude them."
        )
    for x in picked:
        sharded = any(is_sharded(q) or is_flat(q) for q in x.module.parameters())
        if sharded and not (x.is_norm or options_of(x.module)):
            raise InputError(
                f"{x.name} is sharded already: call swap_int8 in configure_model, before "
                "fully_shard."
            )
        if fused_of(x.module) is not None:
            raise InputError(
                f"{x.name} also does the ReLU behind it, whose gradient is not the norm's: swap "
                "norms without fuse, or give norms=None."
            )
    if all(x.reason for x in picked):
        reasons = by_reason({x.name or type(model).__name__: x.reason for x in picked})
        raise InputError(
            f"{type(model).__name__} has no layer that can compute in int8: {'; '.join(reasons)}."
        )
    return picked


def _find(model: nn.Module, norms: str | None) -> list[Candidate]:
    """Return every layer and batch norm that int8 is asked for, under each of its names."""
    found = [Candidate(name, layer, False, reason) for name, layer, reason in find_layers(model)]
    for x in find_norm_layers(model) if norms is not None else ():
        if x.kind == "batch" or isinstance(x.module, _BatchNorm):
            reason = f"swap_norms leaves it: {x.unsupported_reason}" if x.kind is None else ""
            found.append(Candidate(x.name, x.module, True, reason))
    return found


def _choose(
    model: nn.Module, found: list[Candidate], include: Sequence[str], exclude: Sequence[str],
    wanted: str,
) -> list[Candidate]:  # fmt: skip
    """Return those that the patterns leave; a shared one is left if `exclude` names it anywhere."""
    names = [x.name for x in found]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if (wrong := unmatched(patterns, names)) is not None:
            raise InputError(
                f"The pattern {wrong!r} in {argument} matches no {wanted} of "
                f"{type(model).__name__}. There are: {some(names, 3)}."
            )
    excluded = {id(x.module) for x in found if matches(x.name, exclude)}
    kept = [x for x in found if not include or matches(x.name, include)]
    chosen = [x for x in kept if id(x.module) not in excluded]
    if not chosen:
        raise InputError(f"There is no {wanted} in {type(model).__name__}, or none is left.")
    return chosen

"""apply_weight_norm and remove_weight_norm: normalise the weights of a model, and revert it."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from nmlightning.errors import InputError, check_lists
from nmlightning.name_patterns import some
from nmlightning.parametrizations.layers import (
    LayerKind,
    NormalisableWeight,
    find_normalised_weights,
    find_weights,
)
from nmlightning.parametrizations.optimizers import (
    add_to_param_groups,
    check_optimizers,
    param_groups_for_gains,
    remove_from_optimizers,
)
from nmlightning.parametrizations.weight_norm import (
    NAMES,
    FastParametrizationList,
    Gain,
    JointForward,
    Kind,
    Settings,
    WeightNorm,
    fast_property,
    register_post_step,
)
from nmlightning.reports.formatting import Report
from nmlightning.weights.channel_norms import channel_norms, is_flat, is_sharded
from nmlightning.weights.layer_weights import WeightLocation

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, repr=False)
class WeightNormReport(Report):
    """The outcome of `apply_weight_norm`.

    Attributes:
        settings: of the norm.
        weights: the name of each weight that it normalised, and its ρ.
        left: the names of a weight that it left, since the output is computed with it, or several.
        output: the same in words.
        unknown: the names of matrices that it left, and the class of their layer, which is none
            whose output channels are known.
        passed_over: the weights of linear layers, where `layers` is convolutions by default.
        assumed: those that were named nevertheless, whose channels are taken to be along
            dimension 0.
    """

    settings: Settings
    weights: dict[str, float]
    left: tuple[str, ...] = ()
    output: str = ""
    unknown: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return what was normalised, and on which weights it was not, with the reason."""
        bounded = "bounded " if self.settings.kind == "bounded" else ""
        count = len(self.weights)
        name = f"{bounded}weight norm ({NAMES[self.settings.p]})"
        line = f"{name} on {count} weight{'s' * (count != 1)}"
        if self.left:
            line += f"; not on the output layer, {self.output or ' = '.join(self.left)}"
        if self.unknown:
            line += f"; not on {_with_classes(self.unknown)}: name layers by include"
        if self.passed_over:
            line += f"; not on {len(self.passed_over)} of linear layers (add them by layers)"
        if self.assumed:
            line += f"; along dimension 0 of {_with_classes(self.assumed)}"
        return line


def _with_classes(layers: Mapping[str, str]) -> str:
    names = some([f"{name} ({layer})" for name, layer in layers.items()], 3)
    return f"{names}, whose class is not known"


def apply_weight_norm(
    model: nn.Module,
    kind: Kind = "bounded",
    p: float | str = 2,
    *,
    rho: str | float = "init",
    gain: Gain | None = None,
    project: bool = False,
    layers: Sequence[LayerKind] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    optimizers: Optimizer | Iterable[Optimizer] = (),
) -> WeightNormReport:
    """Normalise weights of a model: weight norm or bounded weight norm, by L1, L2 or L∞.

        bounded:  w_i = ρ v_i / ‖v_i‖_p,     with gains  w_i = g_i ‖g⁰‖₂ / ‖g‖₂ · v_i / ‖v_i‖_p
        weight:   w_i = g_i v_i / ‖v_i‖_p

    w_i is the weight of output channel i; v_i and g_i are learned; ρ is one constant for each
    weight. The weights are parametrized (`torch.nn.utils.parametrize`): v is the `Parameter` that
    the weight was, so existing optimizers train it. Norms accumulate in float32, in float64 for
    float64. A weight is computed at each read; `with torch.nn.utils.parametrize.cached():` computes
    it once where a forward pass reads it often.

    Args:
        model: an initialised one, which is changed in place.
        kind: "bounded" or "weight".
        p: 1, 2, or `math.inf`, also as "inf".
        rho: "init" for ρ = ‖V‖_p / N^(1/p) of the N channels that the weight V has now, and
            g_i = ‖v_i‖_p, so that with gains for channels the outputs do not change; or a number
            for ρ and each g_i.
        gain: "none", one for each "channel", or, for kind "weight", one for each "layer". None
            means "none" for "bounded", which may have one for each channel whose common norm
            stays, and "channel" for "weight".
        project: bring ‖v_i‖_p back to ρ after each step of any optimizer. That changes no output;
            without it ‖v‖ grows, and the effective learning rate falls.
        layers: kinds of layers: "conv", "linear" (the projections of attention, too), "recurrent"
            (each gate's rows) and "embedding" (each token's row). The output layer is left out, and
            an embedding that is tied to it. None means convolutions, or none where `include` names
            weights.
        include: glob patterns on the names of parameters that are normalised as well, whatever they
            are of. A tied weight is normalised once and stays tied.
        exclude: glob patterns on names of parameters that are not normalised.
        optimizers: existing ones, which then train the gains too, in the group of v.

    Returns:
        A report of the normalised weights and of those that were left out.

    Raises:
        InputError: a setting that is not allowed; a pattern that matches nothing; no weight, or one
            that is zero in some channel, not finite, complex or integer, sharded, without values,
            or normalised already; gains that an existing optimizer would not train. Nothing was
            changed then.

    Source: Hoffer et al. 2018, §5 (arXiv 1803.01814); Salimans & Kingma 2016 (arXiv 1602.07868).

    Examples:
        >>> print(apply_weight_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())))
        bounded weight norm (L2) on 1 weight
    """
    settings = Settings.of(kind, p, rho, gain, project)
    check_lists(layers=layers or (), include=include, exclude=exclude)
    _validate_model(model)
    choice = find_weights(model, layers, include, exclude)
    weights, passed_over = choice.chosen, tuple(choice.passed_over)
    for weight in weights:
        _validate_weight(weight, settings)
    assumed = {w.name: w.layer_name for w in weights if not w.places[0].is_known}
    if len(passed_over) > len(weights):
        warnings.warn(
            f"{type(model).__name__}: {len(weights)} weights of convolutions are normalised, and "
            f"none of its {len(passed_over)} linear layers: choose by layers, such as "
            '["conv", "linear"], or by include.',
            stacklevel=2,
        )
    groups = {}
    if settings.gain != "none":
        groups = param_groups_for_gains(weights, check_optimizers(optimizers))
    norms = _normalise(model, weights, settings)
    for name, norm in norms.items():
        if norm.gain is not None:
            add_to_param_groups(norm.gain, f"{name} gain", groups[name])
    rhos = {name: float(norm.rho) for name, norm in norms.items()}
    names_left = [[place.name for place in weight.places] for weight in choice.left]
    output = " and ".join(map(" = ".join, names_left))
    left = (*chain(*names_left),)
    return WeightNormReport(settings, rhos, left, output, choice.unknown, assumed, passed_over)


def prepare_for_weights(model: nn.Module, settings: Settings, names: Sequence[str]) -> None:
    """Normalise weights that are about to be loaded, whatever values they have yet."""
    weights = find_weights(model, include=names).chosen
    for weight in weights:
        _validate_weight(weight, settings, spare_zeros=True)
    _normalise(model, weights, settings)


def _normalise(
    model: nn.Module, weights: Sequence[NormalisableWeight], settings: Settings
) -> dict[str, WeightNorm]:
    norms = {}
    positions = [weight.positions for weight in weights]  # before any is moved
    for weight, own_positions in zip(weights, positions, strict=True):
        norm = WeightNorm(weight.parameter, settings, weight.layout)
        norm.positions = own_positions
        computed = [_register(place, norm) for place in weight.places]
        norm.is_registered = True
        if settings.project:
            computed[0].project()
        norms[weight.name] = norm
    # They are computed jointly in the model, in the module that holds them, and just below it.
    paths = [place.path.split(".") for weight in weights for place in weight.places]
    steps = enumerate(zip(*paths, strict=False))
    depth = next((n for n, names in steps if len(set(names)) > 1), min(map(len, paths)))
    above = [{".".join(path[:end]) for end in (0, depth, depth + 1)} for path in paths]
    for name, count in Counter(chain(*above)).items():
        if count > 1:
            JointForward.watch(model.get_submodule(name))
    return norms


def _register(place: WeightLocation, norm: WeightNorm) -> FastParametrizationList:
    unshare_class(place.module)
    parametrize.register_parametrization(place.module, place.attribute, norm)
    cls: Any = type(place.module)  # of its own, as it is parametrized
    setattr(cls, place.attribute, fast_property(vars(cls)[place.attribute], place.attribute))
    if isinstance(place.module, nn.RNNBase) and cls.__deepcopy__ is not _copy_recurrent:
        cls._copy_parametrized = cls.__deepcopy__
        cls.__deepcopy__ = _copy_recurrent
    computed: Any = place.parametrizations
    computed.__class__ = FastParametrizationList  # Torch takes no other class than its own.
    register_post_step(computed)
    return computed  # type: ignore[no-any-return]


def remove_weight_norm(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Turn normalised weights back into plain parameters of exactly the same values.

    Each is the `Parameter` that it was, and the gains are removed from the optimizers.

    Args:
        model: it is changed in place.
        include: glob patterns on names of weights; empty means all that are normalised.
        exclude: glob patterns on names that stay normalised.

    Returns:
        The names of the weights.

    Raises:
        InputError: a pattern that matches nothing; no normalised weight; a weight that has other
            parametrizations, too. Nothing was changed then.
    """
    check_lists(include=include, exclude=exclude)
    _validate_model(model)
    weights = find_normalised_weights(model, include, exclude)
    norms = [weight.norm for weight in weights]
    for weight in weights:
        _make_plain(weight)
    remove_from_optimizers([n.gain for n in norms if n is not None and n.gain is not None])
    for module in model.modules():
        if not any(isinstance(each, WeightNorm) for each in module.modules()):
            JointForward.unwatch(module)
    return [weight.name for weight in weights]


@torch.no_grad()
def _make_plain(weight: NormalisableWeight) -> None:
    norm = weight.norm
    assert norm is not None
    value = norm(weight.parameter).clone()
    for place, position in zip(weight.places, norm.positions, strict=True):
        module, name = place.module, place.attribute
        unshare_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        order = [other for other in module._parameters if other != name]
        order.insert(position, name)
        for each in order:
            module._parameters[each] = module._parameters.pop(each)
    weight.parameter.copy_(value)


def unshare_class(module: nn.Module, base: type[nn.Module] | None = None) -> None:
    """Give a module the class `base`; a parametrized one a class of its own, of that or its base.

    Torch makes one when it parametrizes, and changes that class afterwards; but copies of the
    module have the same one.
    """
    if parametrize.is_parametrized(module):
        cls = type(module)
        kept = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        name = f"Parametrized{base.__name__}" if base else cls.__name__
        module.__class__ = type(name, (base,) if base else cls.__bases__, kept)
    elif base is not None:
        module.__class__ = base


def _copy_recurrent(self: Any, memo: dict[int, Any]) -> Any:
    """Deep-copy a recurrent layer though it holds weights that were computed.

    It keeps those of its last forward in a list, where torch refuses to copy what has a graph. The
    copy computes its own before they are used.
    """
    for w in self._flat_weights:
        if w is not None and not w.is_leaf:
            memo[id(w)] = w.detach()
    return self._copy_parametrized(memo)


def _validate_model(model: Any) -> None:
    """Raise InputError for what cannot have its weights normalised, or made plain, as a whole."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a torch.nn.Module, got {model!r}.")
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Weights cannot be normalised, or made plain, inside torch.inference_mode."
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise InputError(
            "The model is wrapped by DistributedDataParallel already, which keeps the old weights: "
            "normalise them before."
        )


def _validate_weight(
    weight: NormalisableWeight, settings: Settings, *, spare_zeros: bool = False
) -> None:
    """Raise InputError, naming the reason, if a weight cannot be normalised.

    With `spare_zeros` it may have channels that are zero, as it gets other values yet.
    """
    reason = (
        _validate_parameter(weight, settings.rho)
        or _validate_places(weight)
        or _validate_values(weight, spare_zeros)
    )
    if reason:
        raise InputError(f"{weight.name} {reason}")


def _validate_parameter(weight: NormalisableWeight, rho: float | None) -> str | None:
    parameter = weight.parameter
    if weight.norm:
        return "is normalised already; remove_weight_norm reverts that."
    if weight.parametrizations:
        return f"has a parametrization already ({weight.kinds}); remove or exclude it."
    if is_lazy(parameter) or parameter.is_meta:
        return "has no values yet: initialise the model first (with a batch, if it is lazy)."
    if is_flat(parameter) or is_sharded(parameter):
        return (
            "is sharded already: call apply_weight_norm, or let WeightNormSwap, before FSDP "
            "wraps the model (in configure_model before fully_shard)."
        )
    if parameter.dtype not in _DTYPES:
        return f"is of {parameter.dtype}, and only real floating-point weights have a norm here."
    limits = torch.finfo(parameter.dtype)
    if rho is not None and not limits.tiny <= rho <= limits.max:
        allowed = f"{limits.tiny:g} to {limits.max:g}"
        return f"is of {parameter.dtype}, without the number rho = {rho:g}: {allowed}."
    return None if parameter.numel() else "has no elements."


def _validate_places(weight: NormalisableWeight) -> str | None:
    for module in (place.module for place in weight.places):
        if isinstance(module, torch.jit.ScriptModule):
            return "is in a module that is scripted: normalise it first."
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None:
                return f"is renormalised in place by max_norm={module.max_norm:g} already."
            if module.sparse:
                return "has sparse gradients, and that of a normalised weight is dense."
    return None


def _validate_values(weight: NormalisableWeight, spare_zeros: bool) -> str | None:
    norms = channel_norms(weight.parameter, math.inf, weight.layout)
    if not norms.isfinite().all():
        return "has values that are not finite."
    zero = (norms == 0).nonzero().flatten().tolist()
    spared = {getattr(place.module, "padding_idx", None) for place in weight.places}
    zero = [channel for channel in zero if channel not in spared]
    if not zero or spare_zeros:
        return None
    shown = ", ".join(map(str, zero[:5])) + (", …" if len(zero) > 5 else "")
    return (
        f"has {len(zero)} of {len(norms)} channels that are zero ({shown}), which have no "
        "direction: initialise the model first, and normalise its weights then."
    )

"""Which weights cannot be normalised, and why."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import channel_norms
from nmlightning.weights.shards import is_flat, is_sharded
from nmlightning.weights.weight_norm.settings import Settings
from nmlightning.weights.weight_norm.sites import Site

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_model(model: Any) -> None:
    """Raise InputError for what cannot have its weights normalised, or made plain, as a whole."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a torch.nn.Module, got {model!r}.")
    if torch.is_inference_mode_enabled():
        raise InputError(
            "Weights cannot be normalised, or made plain, inside torch.inference_mode."
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise InputError(
            "The model is wrapped by DistributedDataParallel already, which holds on to the "
            "weights as they were: normalise them before."
        )


def check_site(site: Site, settings: Settings, *, spare_zeros: bool = False) -> None:
    """Raise InputError, naming the reason, if a weight cannot be normalised.

    Args:
        site: the weight.
        settings: of the norm.
        spare_zeros: let it have channels that are zero, as it gets other values yet.
    """
    reason = (
        _of_parametrizations(site)
        or _of_parameter(site.parameter)
        or _of_places(site)
        or _of_values(site, spare_zeros)
        or _of_rho(site.parameter.dtype, settings.rho)
    )
    if reason:
        raise InputError(f"{site.name} {reason}")


def _of_parametrizations(site: Site) -> str | None:
    if site.norm:
        return "is normalised already; remove_weight_norm undoes that."
    if site.parametrizations:
        return f"has a parametrization already ({site.kinds}); remove it first."
    return None


def _of_parameter(parameter: Tensor) -> str | None:
    if is_lazy(parameter) or parameter.is_meta:
        return "has no values yet: initialise the model first (with a batch, if it is lazy)."
    if is_flat(parameter) or is_sharded(parameter):
        return (
            "is sharded already: call apply_weight_norm, or let WeightNormSwap, before FSDP "
            "wraps the model (in configure_model before fully_shard)."
        )
    if parameter.dtype not in _DTYPES:
        return f"is of {parameter.dtype}, and only real floating-point weights have a norm here."
    return None if parameter.numel() else "has no elements."


def _of_places(site: Site) -> str | None:
    for module in (place.module for place in site.places):
        if isinstance(module, torch.jit.ScriptModule):
            return "is in a module that is scripted: normalise it first."
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.max_norm is not None:
                return f"is renormalised in place by max_norm={module.max_norm:g} already."
            if module.sparse:
                return "has sparse gradients, and that of a normalised weight is dense."
    return None


def _of_rho(dtype: torch.dtype, rho: float | None) -> str | None:
    limits = torch.finfo(dtype)
    if rho is None or limits.tiny <= rho <= limits.max:
        return None
    return f"is of {dtype}, in which rho = {rho:g} is no number: {limits.tiny:g} to {limits.max:g}."


def _of_values(site: Site, spare_zeros: bool) -> str | None:
    norms = channel_norms(site.parameter, math.inf, site.layout)
    if not norms.isfinite().all():
        return "has values that are not finite."
    zero = (norms == 0).nonzero().flatten().tolist()
    spared = {getattr(place.module, "padding_idx", None) for place in site.places}
    zero = [channel for channel in zero if channel not in spared]
    if not zero or spare_zeros:
        return None
    shown = ", ".join(map(str, zero[:5])) + (", …" if len(zero) > 5 else "")
    return (
        f"has {len(zero)} of {len(norms)} channels that are zero ({shown}), which have no "
        "direction: initialise the model first, and normalise its weights then."
    )

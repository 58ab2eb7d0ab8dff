"""Finds the norm layers of a model, and converts them in place."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

from nmlightning.kernels.interface import Fused, NormKind
from nmlightning.norms.batch_norm_base import RUNNING, BatchNormBase
from nmlightning.norms.layer_norm import LpLayerNorm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm
from nmlightning.norms.registry import NORMS

_NAMED_LIKE_A_NORM = re.compile(r"(Batch|Layer|Group|Instance|RMS|Response)_?Norm", re.IGNORECASE)
_NAMED_RMS = re.compile("RMS", re.IGNORECASE)
_DIMS: dict[type, int | None] = {
    cls: dims for norm in NORMS.values() for dims, cls in norm.batch.items()
}
_LAYER_NORMS = {norm.layer for norm in NORMS.values() if norm.layer is not None}
_RMS_NORMS = {norm.rms for norm in NORMS.values() if norm.rms is not None}
# Instance attributes that only our layers have; what a layer no longer needs is deleted.
_OWN_SETTINGS = ("p", "k", "chunks", "statistic", "constant", "stats_dtype", "sync")
_COMMON_SETTINGS = ("eps", "momentum")
FUSION = "_nmlightning_fusion"  # of the class of a module whose norms are fused
_ORIGINAL_CLASS = "_class_before_swap"
_ACTIVATION_HOOK = "_drop_and_act_hook"
_FAST_PATH = "_activation_relu_or_gelu_before_swap"
_FROZEN_WEIGHT = "_weight_was_frozen_before_swap"


@dataclass(frozen=True)
class NormLayer:
    """A norm layer of a model under one of its names, and the reason if it cannot be swapped."""

    name: str
    module: nn.Module
    kind: NormKind | None
    dims: int | None = None
    unsupported_reason: str = ""

    @property
    def type_name(self) -> str:
        """The name of the class that it has."""
        return type(self.module).__name__

    @property
    def synchronised(self) -> bool:
        """True if it shares its statistics among ranks."""
        return isinstance(self.module, nn.SyncBatchNorm) or bool(
            getattr(self.module, "sync", False)
        )

    def inherited(self) -> dict[str, Any]:
        """Return the constructor arguments that whatever it becomes takes from it."""
        names: tuple[str, ...] = ("normalized_shape", "eps", "elementwise_affine")
        if not isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        settings = {name: getattr(self.module, name) for name in names}
        if isinstance(self.module, nn.LayerNorm):
            settings["bias"] = self.module.bias is not None
        return settings


def find_norm_layers(model: nn.Module) -> list[NormLayer]:
    """Return every norm layer of `model`, a shared one under each of its names."""
    return [
        _describe(_without_wrappers(name), module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_norm(module)
    ]


def is_like(module: nn.Module, template: nn.Module) -> bool:
    """Return whether `module` already is what `template` is, with the same settings."""
    same_class = type(module) is class_to_take(module, template)
    return same_class and _settings(module) == _settings(template)


def convert_in_place(module: nn.Module, template: nn.Module) -> None:
    """Give `module` the class and the settings of `template`; all else stays what it was.

    Except where the norm has no scale: see `MeanOnlyBatchNorm.drop_scale`.
    """
    before, after = type(module), class_to_take(module, template)
    if isinstance(module, MeanOnlyBatchNorm):
        _give_scale_back(module)
    for name in _OWN_SETTINGS:
        module.__dict__.pop(name, None)
    module.__dict__.update(_settings(template))
    module.__class__ = after
    if isinstance(module, BatchNormBase):
        module.keep_statistics_wide()
    elif isinstance(module, _BatchNorm):
        _cast_statistics(module)
    if isinstance(module, MeanOnlyBatchNorm):
        if module.weight is not None and not module.weight.requires_grad:
            module.__dict__[_FROZEN_WEIGHT] = True
        module.drop_scale()
    if after is nn.SyncBatchNorm:
        module.__dict__.setdefault("process_group", None)
    if is_norm_with_activation(before):
        setattr(module, _ORIGINAL_CLASS, before)
        setattr(module, _ACTIVATION_HOOK, module.register_forward_hook(drop_and_act, prepend=True))
    elif is_norm_with_activation(after):
        module.__dict__.pop(_ACTIVATION_HOOK).remove()
        del module.__dict__[_ORIGINAL_CLASS]


def _cast_statistics(module: _BatchNorm) -> None:
    """Give the running statistics the dtype of the weight, as torch's own norms want them."""
    for name in RUNNING:
        running = getattr(module, name)
        if running is not None and module.weight is not None:
            setattr(module, name, running.to(module.weight.dtype))


def _give_scale_back(module: MeanOnlyBatchNorm) -> None:
    """Let the weight, which is 1, learn again, unless it did not before."""
    frozen = module.__dict__.pop(_FROZEN_WEIGHT, False)
    if module.weight is not None:
        module.weight.requires_grad_(not frozen)


def fused_of(norm: nn.Module) -> Fused | None:
    """Return what a norm does after normalising, if anything."""
    fused: Fused | None = vars(norm).get("fused")
    return fused


def has_fused(model: nn.Module) -> bool:
    """Return whether a norm of a model does more than normalise, or a module has a class for it."""
    return any(fused_of(x) is not None or hasattr(type(x), FUSION) for x in model.modules())


def drop_and_act(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of a swapped `BatchNormAct2d`: what timm's class does after its norm."""
    return module.act(module.drop(output))  # type: ignore[no-any-return, operator]


def own_activation(module: nn.Module) -> nn.Module | None:
    """Return what a norm of timm's activates with, swapped or not, if it does anything there."""
    if not (is_norm_with_activation(type(module)) or _ORIGINAL_CLASS in vars(module)):
        return None
    layers = nn.Sequential(module.drop, module.act)  # type: ignore[arg-type]
    if type(module.drop) is not nn.Identity:
        return layers
    return None if type(module.act) is nn.Identity else layers[1]


def set_fused_activation(module: nn.Module, fused: bool) -> None:
    """Let a norm that was timm's activate itself, or by the hook of a swapped one."""
    vars(module)[_ACTIVATION_HOOK].remove()
    if fused:
        vars(module)["fused"] = "relu"
    else:
        del vars(module)["fused"]
        vars(module)[_ACTIVATION_HOOK] = module.register_forward_hook(drop_and_act, prepend=True)


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything but a swap hooks into the calls of a module."""
    own = vars(module).get(_ACTIVATION_HOOK)
    forward = module._forward_hooks.keys() - {own.id if own is not None else None}
    others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return bool(forward) or any(others)


def guard_fast_paths(modules: Iterable[nn.Module]) -> None:
    """Keep torch's encoder layers from computing L2 in evaluation where their norm is another.

    `nn.TransformerEncoderLayer` hands its norms' weights to a fused kernel, whatever class they
    have, unless its activation is neither ReLU nor GELU: that flag is the switch it offers.
    """
    for module in modules:
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        swapped = any(isinstance(child, LpLayerNorm) for child in module.children())
        if swapped and _FAST_PATH not in module.__dict__:
            module.__dict__[_FAST_PATH] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
        elif not swapped and _FAST_PATH in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)


def _without_wrappers(name: str) -> str:
    """Return the name that a module has in the model before `torch.compile` wrapped parts of it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    named_like_one = _NAMED_LIKE_A_NORM.search(type(module).__name__) is not None
    return named_like_one and not any(module.children())


def _describe(name: str, module: nn.Module) -> NormLayer:
    cls = type(module)
    if "forward" in vars(module):
        reason = "its forward was replaced on the object, where no class counts"
    elif cls in _DIMS:
        return NormLayer(name, module, "batch", _DIMS[cls])
    elif is_norm_with_activation(cls):
        return NormLayer(name, module, "batch", 2)
    elif cls in _LAYER_NORMS:
        return NormLayer(name, module, "layer")
    elif cls in _RMS_NORMS:
        return NormLayer(name, module, "rms")
    elif isinstance(module, _LazyNormBase):
        reason = "not initialised, run one batch through it"
    elif isinstance(module, (_BatchNorm, nn.LayerNorm, nn.RMSNorm)):
        reason = "a subclass, and only exact types are swapped"
    elif _NAMED_RMS.search(cls.__name__):
        reason = "a class of its own, and only torch's RMSNorm is swapped"
    else:
        reason = "no swap is defined for this norm"
    return NormLayer(name, module, None, unsupported_reason=reason)


def is_norm_with_activation(cls: type) -> bool:
    """Return whether a class is timm's batch norm that also drops and activates."""
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.startswith("timm.")


def class_to_take(module: nn.Module, template: nn.Module) -> type[nn.Module]:
    """Return the template's class; a layer that goes back to L2 takes the class it came from."""
    if type(template) is nn.BatchNorm2d and is_norm_with_activation(type(module)):
        return type(module)
    if type(template) is nn.BatchNorm2d:
        return module.__dict__.get(_ORIGINAL_CLASS, nn.BatchNorm2d)  # type: ignore[no-any-return]
    return type(template)


def _settings(module: nn.Module) -> dict[str, Any]:
    names = (*_COMMON_SETTINGS, *_OWN_SETTINGS)
    return {name: vars(module)[name] for name in names if name in vars(module)}

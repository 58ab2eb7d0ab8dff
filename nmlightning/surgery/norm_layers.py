"""Finds the norm layers of a model, converts them in place, and watches what replaces them."""

import copy
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_module_registration_hook

from nmlightning.errors import InputError
from nmlightning.kernels.interface import Fused, NormKind
from nmlightning.name_patterns import plain_name
from nmlightning.norms.batch_norm_base import RUNNING, BatchNormBase, describe_norm
from nmlightning.norms.mean_only import MeanOnlyBatchNorm
from nmlightning.norms.norm_free import NormFree
from nmlightning.norms.registry import NORMS, path_of
from nmlightning.surgery import foreign_norms
from nmlightning.surgery.norm_act import class_of_both, has_activation
from nmlightning.weights import layer_weights

_NAMED_LAYER_OR_RMS = re.compile(r"(Layer|RMS|L2)_?Norm", re.IGNORECASE)
_DIMS: dict[type, int | None] = {
    cls: dims for norm in NORMS.values() for dims, cls in norm.batch.items()
}
_LAYER_NORMS = {norm.layer for norm in NORMS.values() if norm.layer is not None}
_RMS_NORMS = {norm.rms for norm in NORMS.values() if norm.rms is not None}
# Instance attributes that only our layers have; what a layer no longer needs is deleted.
_OWN_SETTINGS = ("p", "k", "chunks", "statistic", "constant", "stats_dtype", "sync", "alpha_init")
FUSION = "_nmlightning_fusion"  # of the class of a module whose norms are fused
_FROZEN_WEIGHT = "_weight_was_frozen_before_swap"


@dataclass(frozen=True)
class NormLayer:
    """A norm layer of a model under one of its names, and the reason if it cannot be swapped."""

    name: str
    module: nn.Module
    kind: NormKind | None
    dims: int | None = None
    unsupported_reason: str = ""
    form: foreign_norms.NormForm | None = None  # of another library's layer or RMS norm

    @property
    def type_name(self) -> str:
        return type(self.module).__name__

    @property
    def synchronised(self) -> bool:
        """True if it shares its statistics among ranks."""
        return bool(getattr(self.module, "sync", isinstance(self.module, nn.SyncBatchNorm)))

    def inherited(self) -> dict[str, Any]:
        """Return the constructor arguments that whatever it becomes takes from it."""
        if self.form is not None:
            return {"normalized_shape": 1, "eps": self.form.eps_of(self.module)}
        names: tuple[str, ...] = ("normalized_shape", "eps", "elementwise_affine")
        if not isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
        settings = {name: getattr(self.module, name) for name in names}
        if isinstance(self.module, nn.LayerNorm):
            settings["bias"] = self.module.bias is not None
        return settings


def find_norm_layers(
    model: nn.Module, types: Mapping[str, NormKind] | None = None
) -> list[NormLayer]:
    """Return every norm layer of `model`, a shared one under each of its names.

    Those whose class `types` names are of the kind it says, if they compute that.
    """
    types = types or {}
    layers = [
        _describe(plain_name(name), module, types.get(path_of(type(module))))
        for name, module in model.named_modules(remove_duplicate=False)
        if is_norm(module) or path_of(type(module)) in types
    ]
    left = [x for x in layers if x.unsupported_reason]
    # Norms within one that is left are left, too, so that none is swapped by half.
    reasons = {
        module: f"a part of {x.name} ({x.type_name}), which is not swapped"
        for x in left
        for module in x.module.modules()
        if module is not x.module
    }
    return [
        NormLayer(x.name, x.module, None, unsupported_reason=reasons[x.module])
        if x.module in reasons
        else x
        for x in layers
    ]


def is_like(module: nn.Module, template: nn.Module) -> bool:
    """Return whether `module` already is what `template` is, with the same settings."""
    same_class = type(module) is class_to_take(module, template)
    return same_class and _settings(module) == _settings(template)


def convert_in_place(module: nn.Module, template: nn.Module) -> None:
    """Give `module` the class and the settings of `template`; all else stays what it was.

    Except where the norm has no scale: see `MeanOnlyBatchNorm.drop_scale`.
    """
    after = class_to_take(module, template)
    if isinstance(module, MeanOnlyBatchNorm):  # its weight, which is 1, learns as it did before
        frozen = module.__dict__.pop(_FROZEN_WEIGHT, False)
        for scale in module.scales():
            scale.requires_grad_(not frozen)
    for name in _settings(module):
        del module.__dict__[name]
    for name in module.scalars if isinstance(module, NormFree) else ():
        del module._parameters[name]
    module.__dict__.update(_settings(template))
    module.__class__ = after
    if isinstance(module, NormFree):
        module.add_scalars(next(module.parameters(recurse=False), torch.empty(0)).detach())
    if isinstance(module, BatchNormBase):
        module.keep_statistics_wide()
    elif isinstance(module, _BatchNorm) and module.weight is not None:
        for name in RUNNING:  # torch's own norms want them in the dtype of the weight
            if (running := getattr(module, name)) is not None:
                setattr(module, name, running.to(module.weight.dtype))
    if isinstance(module, MeanOnlyBatchNorm):
        if any(not scale.requires_grad for scale in module.scales()):
            module.__dict__[_FROZEN_WEIGHT] = True
        module.drop_scale()
    if issubclass(after, nn.SyncBatchNorm):
        module.__dict__.setdefault("process_group", None)


@contextmanager
def whole_or_not_at_all(model: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Leave classes, and attributes and tensors of norms, as they were if anything is raised."""
    norms = set(norms)
    before = [
        (m, type(m), {k: v.copy() if isinstance(v, dict) else v for k, v in vars(m).items()})
        for m in model.modules()
    ]
    values = [(q, q.detach().clone(), q.requires_grad, q.grad) for m in norms for q in _tensors(m)]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            if module in norms or type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
                vars(module).clear()
                vars(module).update(attributes)
        for tensor, value, learns, grad in values:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value).requires_grad_(learns)
            tensor.grad = grad
        raise


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def fused_of(norm: nn.Module) -> Fused | None:
    """Return what a norm does after normalising, if anything."""
    fused: Fused | None = vars(norm).get("fused")
    return fused


def has_fused(model: nn.Module) -> bool:
    """Return whether a norm of a model does more than normalise, or a module has a class for it."""
    return any(fused_of(x) is not None or hasattr(type(x), FUSION) for x in model.modules())


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything hooks into the calls of a module."""
    others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return bool(module._forward_hooks) or any(others)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm as a whole; in others each module is looked at."""
    whole = {*module._modules.keys()} <= foreign_norms.ACTIVATION
    whole = whole or isinstance(module, layer_weights.TORCH_NORMS)
    return whole and layer_weights.is_norm(module)


def _describe(name: str, module: nn.Module, named: NormKind | None) -> NormLayer:
    cls, library = type(module), type(module).__module__.partition(".")[0]
    like_torchs = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    like_torchs = like_torchs or _NAMED_LAYER_OR_RMS.search(cls.__name__) is not None
    if "forward" in vars(module):
        reason = "its forward was replaced on the object, where no class counts"
    elif cls in _DIMS:
        return NormLayer(name, module, "batch", _DIMS[cls])
    elif has_activation(cls) or (isinstance(module, BatchNormBase) and hasattr(cls, "replaced")):
        return NormLayer(name, module, "batch", _dims_of(module))
    elif cls in _LAYER_NORMS:
        return NormLayer(name, module, "layer")
    elif cls in _RMS_NORMS:
        return NormLayer(name, module, "rms")
    elif isinstance(module, _LazyNormBase):
        reason = "not initialised, run one batch through it"
    elif named == "batch" or isinstance(module, _BatchNorm):
        reason = f"a subclass: name it by types={{'{path_of(cls)}': 'batch'}}"
        if module._modules:
            reason = f"a subclass with modules in it ({', '.join(module._modules)})"
        reason = foreign_norms.find_batch_reason(module) if named == "batch" else reason
        if not reason:
            return NormLayer(name, module, "batch", _dims_of(module))
    elif isinstance(module, foreign_norms.SwappedNorm):
        return NormLayer(name, module, module.form.kind, form=module.form)
    elif named is not None or (like_torchs and library in foreign_norms.KNOWN_PACKAGES):
        form = foreign_norms.find_form(module, (named,) if named else ("layer", "rms"), bool(named))
        if isinstance(form, foreign_norms.NormForm):
            return NormLayer(name, module, form.kind, form=form)
        reason = form
    elif like_torchs:
        rms = isinstance(module, nn.RMSNorm) or "rms" in cls.__name__.lower()
        kind = "rms" if rms else "layer"
        reason = f"an unknown class: name it by types={{'{path_of(cls)}': '{kind}'}}"
    else:
        reason = "no swap is defined for this norm"
    return NormLayer(name, module, None, unsupported_reason=reason)


def _dims_of(module: nn.Module) -> int | None:
    own = NORMS["l2"].batch.items()
    return next((dims for dims, cls in own if dims and isinstance(module, cls)), None)


def class_to_take(module: nn.Module, template: nn.Module) -> type[nn.Module]:
    """Return the template's class, or one of both where the module's is another library's."""
    before, after = type(module), type(template)
    plain = before in _DIMS and before is not nn.SyncBatchNorm
    return after if plain or not isinstance(module, _BatchNorm) else class_of_both(before, after)


def _settings(module: nn.Module) -> dict[str, Any]:
    own = ("momentum", *_OWN_SETTINGS)
    return {
        x: value
        for x, value in vars(module).items()
        if x in own or foreign_norms.EPS_NAME.search(x)
    }


_FUSER_MAPPINGS = "torch.ao.quantization.fuser_method_mappings"  # imported with torch
_FROZEN_NORM = "_swapped_norm_before_it_was_frozen"


@cache
def watch_other_code() -> None:
    """Teach torch's `fuse_modules` our norms, and warn where other code puts another in place."""
    register_module_module_registration_hook(_check_replacement)
    plain, mappings = NORMS["l2"].batch, sys.modules.get(_FUSER_MAPPINGS)
    fusers: dict[Any, Any] = getattr(mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    for classes, fuse in list(fusers.items()):
        dims = next((n for n, cls in plain.items() if cls in classes), None)
        for norm in (x for x in NORMS.values() if dims and dims in x.batch):
            own = tuple(norm.batch[dims] if cls is plain[dims] else cls for cls in classes)
            fusers.setdefault(own, partial(_fuse, fuse, norm.batch[dims], plain[dims]))


def _fuse(fuse: Any, ours: type, plain: type, is_qat: bool, *modules: nn.Module) -> nn.Module:
    """Fuse evaluated modules as torch does those of its own norm."""
    stand_ins = []
    for module in modules:
        is_ours = type(module) is ours
        if is_ours and (is_qat or module.training or fused_of(module) is not None):
            raise InputError(
                f"torch fuses {ours.__name__} in evaluation only, and without a ReLU of its own: "
                'call eval(), swap_norms without fuse, or swap_norms(model, "l2") first.'
            )
        stand_ins.append(copy.copy(module) if is_ours else module)
        stand_ins[-1].__class__ = plain if is_ours else type(module)
    fused: nn.Module = fuse(is_qat, *stand_ins)
    return fused


def _check_replacement(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Warn where a norm of ours is replaced by one that is not, also after it was frozen."""
    old: Any = parent._modules.get(name)
    norm = type(old).__name__ if old is not None and describe_norm(old) is not None else None
    norm = vars(old).get(_FROZEN_NORM, norm) if old is not None else None
    if new is None or new is old or norm is None or describe_norm(new) is not None:
        return
    if not is_norm(new) or isinstance(new, nn.GroupNorm | _InstanceNorm):
        return
    if not isinstance(new, _NormBase | nn.LayerNorm | nn.RMSNorm) and hasattr(new, "running_var"):
        vars(new)[_FROZEN_NORM] = norm  # which evaluates as ours does
        return
    warnings.warn(
        f"{norm} in {type(parent).__name__} is replaced by {type(new).__name__}, "
        "which computes another norm: call swap_norms again after this.",
        stacklevel=3,
    )

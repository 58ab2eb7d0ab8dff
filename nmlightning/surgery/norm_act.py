"""Swaps of other people's batch norms: classes that are both ours and theirs.

Code that asks for timm's `BatchNormAct2d`, or builds another norm of its `drop` and `act`, finds
what it looks for. Such a class is made when it is first needed; its objects copy and pickle.
"""

import re
import sys
from functools import cache
from types import new_class
from typing import Any

from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.fx import Proxy

_TIMM = ("BatchNormAct2d", "SyncBatchNormAct")
_BASES = "_swapped_norm_act_bases"


class _OfBoth:
    """The first base of such a class: it computes the second's norm, and is of the third."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle an object of a class that no import finds."""
        return (_make, getattr(type(self), _BASES), *object.__reduce_ex__(self, protocol)[2:])


class _DropAndAct(_OfBoth):
    """The same of timm's: it also drops and activates."""

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the norm does, dropped and activated, unless the norm does that itself."""
        if is_scripting():
            output = self.act(self.drop(self.evaluate_scripted(input)))
        else:
            output = super().forward(input, residual)  # type: ignore[misc]
            recorded = isinstance(input, Proxy) and input.tracer.root is not self
            if self.fused is None and not recorded:
                output = self.act(self.drop(output))
        return output  # type: ignore[no-any-return]


def has_activation(cls: type) -> bool:
    """Return whether a class is timm's batch norm that also drops and activates, or a swapped."""
    is_timms = cls.__name__ in _TIMM and cls.__module__.startswith("timm.")
    return is_timms or issubclass(cls, _DropAndAct)


def class_of_both(before: type, norm: type) -> type[nn.Module]:
    """Return the class that another library's becomes where its norm becomes `norm`."""
    theirs = getattr(before, _BASES, (None, before))[1]
    if not has_activation(theirs):
        return _class_of_both(norm, theirs) if hasattr(norm, "backend_for") else theirs
    timm: Any = sys.modules[theirs.__module__]
    if norm is nn.SyncBatchNorm:
        return timm.SyncBatchNormAct  # type: ignore[no-any-return]
    theirs = timm.BatchNormAct2d
    return theirs if norm is nn.BatchNorm2d else _class_of_both(norm, theirs)


def own_activation(module: nn.Module) -> nn.Module | None:
    """Return what a norm activates with itself, swapped or not, if it does anything there."""
    if not has_activation(type(module)):
        return None
    layers = nn.Sequential(module.drop, module.act)  # type: ignore[arg-type]
    if type(module.drop) is not nn.Identity:
        return layers
    return None if type(module.act) is nn.Identity else layers[1]


@cache
def _class_of_both(ours: type, theirs: type) -> type[nn.Module]:
    name = re.sub(r"BatchNorm(\dd)?$", "", ours.__name__) + theirs.__name__
    members: dict[str, Any] = {
        "__module__": __name__,
        # By its path jsonargparse leaves it out, which offers all subclasses to configs.
        "__qualname__": f"_Swapped.{name}",
        "__doc__": theirs.__doc__,
        "replaced": theirs,
        _BASES: (ours, theirs),
    }
    first = _DropAndAct if has_activation(theirs) else _OfBoth
    return new_class(name, (first, ours, theirs), exec_body=lambda body: body.update(members))


def _make(ours: type, theirs: type) -> Any:
    cls = _class_of_both(ours, theirs)
    return cls.__new__(cls)

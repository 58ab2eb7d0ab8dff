"""Layer and RMS norms of other libraries: what each computes, and the class that it has swapped.

timm, torchvision, Hugging Face and others have dozens of classes that are one of torch's two norms
but for the axis, 1 + weight in place of the weight, the name of eps, a cast, or an activation. What
a class computes is found out on random inputs; names alone decide nothing.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nmlightning.functional.reductions import is_half
from nmlightning.norms.fast_path import traceable
from nmlightning.norms.layer_norm import LpLayerNorm, LpRMSNorm, normalise_features

KNOWN_PACKAGES = {
    *("timm", "torchvision", "transformers", "transformers_modules"),
    *("diffusers", "open_clip", "torchtune", "apex"),
}
EPS_NAME = re.compile(r"(^|_)eps(ilon)?$")
ACTIVATION = {"drop", "act"}  # children that timm's norms call, in this order, on their output
_SCALES = (1.0, 3e-2, 1e-3)  # of the inputs: eps counts in small ones
_TOLERANCE = 1e-3  # in float32 the right formula is 1e-6 off
_FIXED_EPS = (1e-5, 1e-6, 1e-8, 0.0)  # where no attribute says it

ForeignKind = Literal["layer", "rms"]


@dataclass(frozen=True)
class NormForm:
    """How a class differs from torch's norm of its kind.

    Attributes:
        kind: whether it centres.
        channels_first: it normalises over dimension 1, as of (N, C, H, W).
        offset: what is added to the weight, 0 or 1.
        eps: the name of the attribute, or the number.
        apart: it normalises the last dimension, whatever the shape of the weight.
        activates: it calls its `drop` and `act` on the result.
        widens: of a half input, a weight of float32 makes float32.
        narrows: of an input of float32, a half weight makes half.
    """

    kind: ForeignKind
    channels_first: bool
    offset: float
    eps: str | float
    apart: bool
    activates: bool
    widens: bool = False
    narrows: bool = False

    def eps_of(self, module: nn.Module) -> float | None:
        """Return the eps of a module, of which another may be set on a swapped one."""
        value = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        return vars(module).get("eps", value)  # type: ignore[no-any-return]


class _Shape:
    """The sizes that a class without `normalized_shape` normalises; a module's own comes first."""

    def __get__(self, module: Any, _: type) -> tuple[int, ...]:
        weight = getattr(module, "weight", None)
        return () if weight is None else tuple(weight.shape)


class _Eps:
    def __get__(self, module: Any, cls: Any) -> float | None:
        return None if module is None else cls.form.eps_of(module)


class SwappedNorm:
    """What every swapped norm of another library does; it is also one of ours and of theirs."""

    form: NormForm
    ours: type[nn.Module]
    replaced: type[nn.Module]
    normalized_shape = _Shape()
    eps = _Eps()

    @traceable
    def forward(self: Any, input: Tensor) -> Tensor:
        """Return the normalised input, in the dtype that the library's class gives."""
        form = type(self).form
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        learned = input.dtype if weight is None else weight.dtype
        if weight is not None and form.offset:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + form.offset
        x = input.movedim(1, -1).contiguous() if form.channels_first else input
        inside = (None, None) if form.apart else (weight, bias)
        sizes = x.shape[-1:] if form.apart else tuple(self.normalized_shape) or x.shape[-1:]
        y = normalise_features(x, self, *inside, sizes, self.eps, centred=form.kind == "layer")
        if form.apart:
            y = _give_affine(y, weight, bias).to(y.dtype)
        y = y.movedim(-1, 1) if form.channels_first else y
        if learned != input.dtype and (form.narrows if is_half(learned) else form.widens):
            y = y.to(learned)
        return self.act(self.drop(y)) if form.activates else y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle an object of a class that no import finds."""
        cls = type(self)
        made_of = (cls.ours, cls.replaced, cls.form)
        return (_make, made_of, *object.__reduce_ex__(self, protocol)[2:])


@cache
def swapped_class(ours: type, replaced: type, form: NormForm) -> type:
    """Return the class of a module that was of class `replaced` and is one of our norms."""
    prefix = re.sub("(Layer|RMS)Norm$", "", ours.__name__)
    name = prefix + replaced.__name__
    members = {
        "__module__": __name__,
        "__qualname__": f"_Swapped.{name}",  # a path that jsonargparse does not offer to configs
        "__doc__": replaced.__doc__,
        "form": form,
        "ours": ours,
        "replaced": replaced,
    }
    return type(name, (SwappedNorm, ours, replaced), members)


def _make(ours: type, replaced: type, form: NormForm) -> Any:
    return object.__new__(swapped_class(ours, replaced, form))


def make_foreign(template: nn.Module, module: nn.Module, form: NormForm, has_eps: bool) -> None:
    """Give the template of a swap of `module` the class and the name of eps that it shall have."""
    replaced: type = type(module).replaced if isinstance(module, SwappedNorm) else type(module)
    own_class: type = type(template)
    ours = isinstance(template, (LpLayerNorm, LpRMSNorm))
    eps = vars(template).pop("eps")
    if isinstance(form.eps, str) or (has_eps and ours):
        vars(template)[form.eps if isinstance(form.eps, str) else "eps"] = eps
    template.__class__ = swapped_class(own_class, replaced, form) if ours else replaced


def is_known(cls: type) -> bool:
    """Return whether a class is of a library whose norms are tried without being asked to."""
    return cls.__module__.partition(".")[0] in KNOWN_PACKAGES


def find_form(module: nn.Module, kinds: tuple[ForeignKind, ...]) -> NormForm | str:
    """Return how a module differs from torch's norm of one of the kinds, or why it is none."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return "its forward takes more than one input"
    if not set(dict(module.named_children())) <= ACTIVATION:
        return "it has modules in it"
    twin, closest, error = _twin_of(module), float("inf"), ""
    for channels_first, shape in _input_shapes(twin):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
        inputs = [scale * x for scale in _SCALES]
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                found = [twin.forward(x.clone()) for x in inputs]
        except Exception as problem:
            error = f"{type(problem).__name__} for an input of shape {tuple(shape)}"
            continue
        for form in _candidates(twin, kinds, channels_first):
            closest = min(closest, deviation := _deviation(form, twin, inputs, found))
            if deviation < _TOLERANCE:
                half, wide = torch.bfloat16, torch.float32
                widens = _output_dtype(twin, wide, x.to(half)) == wide
                narrows = _output_dtype(twin, half, x) == half
                return replace(form, widens=widens, narrows=narrows)
    title = " or ".join({"layer": "layer", "rms": "RMS"}[kind] for kind in kinds)
    off = f"on a random input it is {closest:.2g} off" if closest < float("inf") else error
    return f"it does not compute a {title} norm: {off}"


def _output_dtype(twin: Any, learned: torch.dtype, input: Tensor) -> torch.dtype | None:
    """Return the dtype of the output with parameters of a dtype, None where it cannot be."""
    other = copy.copy(twin)
    for stored in ("_parameters", "_buffers"):
        cast = {name: q if q is None else q.to(learned) for name, q in vars(twin)[stored].items()}
        vars(other)[stored] = cast
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return other.forward(input).dtype  # type: ignore[no-any-return]
    except Exception:
        return None


def _twin_of(module: nn.Module) -> Any:
    """Return a copy with random parameters on the CPU, whatever those of the module are."""
    twin, generator = copy.copy(module), torch.Generator().manual_seed(0)

    def random(q: Tensor | None) -> Tensor | None:
        return None if q is None else torch.randn(q.shape, generator=generator) + 0.5

    for stored in ("_parameters", "_buffers"):
        vars(twin)[stored] = {name: random(q) for name, q in vars(module)[stored].items()}
    children = {name: nn.Tanh() if name == "act" else nn.Identity() for name in module._modules}
    vars(twin).update(_modules=children, training=False)
    return twin


def _input_shapes(twin: Any) -> Iterator[tuple[bool, tuple[int, ...]]]:
    sizes = tuple(getattr(twin, "normalized_shape", ())) or _Shape().__get__(twin, object)
    sizes = sizes or (getattr(twin, "dim", 6) if isinstance(getattr(twin, "dim", 6), int) else 6,)
    yield False, (2, 3, *sizes)
    if len(sizes) == 1:
        yield True, (2, *sizes, 3, 4)
        yield True, (2, *sizes, 5)


def _candidates(twin: Any, kinds: tuple[ForeignKind, ...], first: bool) -> Iterator[NormForm]:
    weight = getattr(twin, "weight", None)
    named = [x for x, value in vars(twin).items() if EPS_NAME.search(x) and _is_eps(value)]
    activates = set(twin._modules) == ACTIVATION
    offsets = (0.0,) if weight is None else (0.0, 1.0)
    for kind, offset, eps, apart in product(kinds, offsets, named or _FIXED_EPS, (False, True)):
        yield NormForm(kind, first, offset, eps, apart, activates)


def _is_eps(value: Any) -> bool:
    return value is None or (isinstance(value, float | int) and not isinstance(value, bool))


def _deviation(form: NormForm, twin: Any, inputs: list[Tensor], found: list[Any]) -> float:
    """Return how far the outputs are from what the form says, at most, in parts of their size."""
    weight, bias = getattr(twin, "weight", None), getattr(twin, "bias", None)
    weight = weight if weight is None else weight + form.offset
    worst = 0.0
    for input, output in zip(inputs, found, strict=True):
        x = input.movedim(1, -1).double() if form.channels_first else input.double()
        sizes = tuple(getattr(twin, "normalized_shape", ())) or _Shape().__get__(twin, object)
        dims = tuple(range(-max(1, 1 if form.apart else len(sizes)), 0))
        x = x - x.mean(dims, True) if form.kind == "layer" else x
        eps = form.eps_of(twin)
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        try:
            y = _give_affine(x / (x.square().mean(dims, True) + eps).sqrt(), weight, bias)
        except RuntimeError:  # a weight that does not fit this form
            return float("inf")
        y = y.movedim(-1, 1) if form.channels_first else y
        y = y.tanh() if form.activates else y
        if not isinstance(output, Tensor) or output.shape != y.shape:
            return float("inf")
        worst = max(worst, float((output.double() - y).abs().max() / y.abs().max()))
    return worst


def _give_affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

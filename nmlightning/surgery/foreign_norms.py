"""Layer and RMS norms of other libraries: what each computes, and the class that it has swapped.

timm, torchvision, Hugging Face and others have dozens of classes that are one of torch's two norms
but for the axis, 1 + weight in place of the weight, the name of eps, a cast, or an activation. What
a class computes is found out on random inputs; names alone decide nothing.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softsign
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import InputError
from nmlightning.functional.reductions import is_half
from nmlightning.kernels.interface import NormKind
from nmlightning.norms.fast_path import traceable
from nmlightning.norms.layer_norm import FeatureNorm, normalise_features

# Libraries whose norms are tried without being asked to.
KNOWN_PACKAGES = {
    *("timm", "torchvision", "transformers", "transformers_modules"),
    *("diffusers", "open_clip", "torchtune", "apex"),
}
EPS_NAME = re.compile(r"(^|_)eps(ilon)?$")
ACTIVATION = {"drop", "act"}  # children that timm's norms call, in this order, on their output
_OPTIONAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_USUAL = ("weight", "bias")
_TITLES = {"layer": "a layer", "rms": "an RMS", "batch": "a batch"}
_SCALES = (1.0, 3e-2, 1e-3, 1e-6)  # of the inputs: eps counts in small ones
_TOLERANCE = 1e-3  # in float32 the right formula is 1e-6 off
_FLOAT32 = torch.finfo(torch.float32).eps
_FIXED_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-4, 1e-7, _FLOAT32, 1e-24)  # if none is an attribute


@dataclass(frozen=True)
class NormForm:
    """How a class differs from torch's norm of its kind."""

    kind: NormKind  # whether it centres
    channels_first: bool  # it normalises over dimension 1, as of (N, C, H, W)
    offset: float  # what is added to the weight, 0 or 1
    eps: str | float  # the name of the attribute, or the number
    apart: bool  # it normalises the last dimension, whatever the shape of the weight
    activates: bool  # it calls its `drop` and `act` on the result
    weight: str | None = "weight"  # the name of the parameter or buffer, if there is one
    bias: str | None = "bias"
    widens: bool = False  # the result has the wider dtype of the input and the weight
    narrows: bool = False  # it has that of the weight, if that is half

    def eps_of(self, module: nn.Module) -> float | None:
        """Return the eps of a module, of which another may be set on a swapped one."""
        value = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps
        return vars(module).get("eps", value)  # type: ignore[no-any-return]

    def affine_of(self, module: nn.Module) -> tuple[Any, Any]:
        """Return the weight and the bias of a module, as it stores them."""
        weight = getattr(module, self.weight, None) if self.weight else None
        return weight, getattr(module, self.bias, None) if self.bias else None

    def sizes_of(self, module: nn.Module) -> tuple[int, ...]:
        """Return the sizes that it normalises; none where only the input says them."""
        weight, bias = self.affine_of(module)
        q = bias if weight is None else weight
        return _own_sizes(module) or (() if q is None else _sizes(q))


def _own_sizes(module: nn.Module) -> tuple[int, ...]:
    own = vars(module).get("normalized_shape", ())
    return (own,) if isinstance(own, int) else tuple(own)


def _sizes(q: Tensor) -> tuple[int, ...]:
    """Return the sizes of a weight but for those that only broadcast, as of (1, C, 1, 1)."""
    return tuple(q.shape) if q.dim() == 1 < q.numel() else tuple(n for n in q.shape if n != 1)


class _Shape:
    """The sizes that a class without `normalized_shape` normalises; a module's own comes first."""

    def __get__(self, module: Any, cls: Any) -> tuple[int, ...]:
        return () if module is None else cls.form.sizes_of(module)


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
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the normalised input, in the dtype that the library's class gives."""
        form = type(self).form
        input = args[0] if len(args) == 1 and not kwargs else _only_input(self, args, kwargs)
        weight, bias = form.affine_of(self)
        learned = input.dtype if weight is None else weight.dtype
        if form.offset and weight is not None:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + form.offset
        x = input.movedim(1, -1).contiguous() if form.channels_first else input
        sizes = x.shape[-1:] if form.apart else form.sizes_of(self) or x.shape[-1:]
        inner, shift = (None, None) if form.apart else _flatten(weight, bias, sizes)
        centred, eps = form.kind == "layer", form.eps_of(self)
        y = normalise_features(x, self, inner, shift, sizes, eps, centred=centred)
        if form.apart:
            y = _give_affine(y, weight, bias).to(y.dtype)
        y = y.movedim(-1, 1) if form.channels_first else y
        if form.narrows and is_half(learned):
            y = y.to(learned)
        elif form.widens and learned != input.dtype:  # an exported program would keep the cast
            y = y.to(torch.promote_types(learned, input.dtype))
        return self.act(self.drop(y)) if form.activates else y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle an object of a class that no import finds."""
        made_of = (type(self).ours, type(self).replaced, type(self).form)
        return (_make, made_of, *object.__reduce_ex__(self, protocol)[2:])


@cache
def swapped_class(ours: type, replaced: type, form: NormForm) -> type:
    """Return the class of a module that was of class `replaced` and is one of our norms."""
    name = re.sub("(Layer|RMS)Norm$", "", ours.__name__) + replaced.__name__
    members = {
        "__module__": __name__,
        "__qualname__": f"_Swapped.{name}",  # a path that jsonargparse does not offer to configs
        "__doc__": replaced.__doc__,
        "form": form,
        "ours": ours,
        "replaced": replaced,
    }
    return type(name, (SwappedNorm, ours, replaced), members)


def _only_input(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a call that leaves all else as it is by default."""
    call = inspect.signature(norm.replaced.forward).bind(norm, *args, **kwargs)
    (_, input), *others = [*call.arguments.items()][1:]
    for name, value in others:
        default = call.signature.parameters[name].default
        if value is not default and (isinstance(value, Tensor) or value != default):
            raise InputError(
                f"{type(norm).__name__} normalises one input, and got {name} as well, with which "
                f"{norm.replaced.__name__} may compute something else: exclude it from the swap."
            )
    return input  # type: ignore[no-any-return]


def _flatten(weight: Any, bias: Any, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    weight = weight if weight is None or weight.shape == sizes else weight.reshape(sizes)
    return weight, bias if bias is None or bias.shape == sizes else bias.reshape(sizes)


def _make(ours: type, replaced: type, form: NormForm) -> Any:
    return object.__new__(swapped_class(ours, replaced, form))


def make_foreign(template: nn.Module, module: nn.Module, form: NormForm, has_eps: bool) -> None:
    """Give the template of a swap of `module` the class and the name of eps that it shall have."""
    replaced: type = type(module).replaced if isinstance(module, SwappedNorm) else type(module)
    own_class: type = type(template)
    ours = isinstance(template, FeatureNorm)
    eps = vars(template).pop("eps")
    if isinstance(form.eps, str) or (has_eps and ours):
        vars(template)[form.eps if isinstance(form.eps, str) else "eps"] = eps
    template.__class__ = swapped_class(own_class, replaced, form) if ours else replaced


def find_form(module: nn.Module, kinds: tuple[NormKind, ...], named: bool) -> NormForm | str:
    """Return how a module differs from torch's norm of one of the kinds, or why it is none.

    Of a class that is `named`, optional arguments are left to their defaults.
    """
    given = inspect.signature(type(module).forward).parameters.values()
    optional = {q for q in given if q.default is not q.empty or q.kind in _OPTIONAL}
    parameters = [q for q in given if not named or q not in optional]
    if len(parameters) != 2 or parameters[1].kind is inspect.Parameter.KEYWORD_ONLY:
        return "its forward takes more than one input"
    if not set(module._modules) <= ACTIVATION:
        return f"it has modules in it ({', '.join(module._modules)}), each of which is looked at"
    twin, closest, error = _twin_of(module), float("inf"), ""
    for channels_first, shape in _input_shapes(twin):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
        inputs = [scale * x for scale in _SCALES]
        try:
            found = _outputs(twin, inputs)
        except Exception as problem:
            error = error or f"{type(problem).__name__} for an input of shape {tuple(shape)}"
            continue
        error = "it gives nothing finite of the input's shape"
        for form in _candidates(twin, kinds, channels_first):
            closest = min(closest, deviation := _deviation(form, twin, inputs, found))
            if deviation < _TOLERANCE:
                widens = _output_dtype(twin, torch.float32, x.bfloat16()) == torch.float32
                narrows = _output_dtype(twin, torch.bfloat16, x) == torch.bfloat16
                reason = _other_reason(form, module, twin, inputs)
                return reason or replace(form, widens=widens, narrows=narrows)
    off = f"on a random input it is {closest:.2g} off" if closest < float("inf") else error
    return f"it does not compute {' or '.join(_TITLES[kind] for kind in kinds)} norm: {off}"


def _other_reason(form: NormForm, module: nn.Module, twin: Any, inputs: list[Tensor]) -> str:
    """Return why a module is no such norm in training or of large values, or ""; scales `twin`."""
    fresh, tensors = _tensors(_twin_of(module)), _tensors(twin)
    for seed, factor in ((0, 1.0), (1, 1.0), (0, 1e3)):
        twin.training = factor == 1.0
        when = "in training" if twin.training else "of large values"
        try:
            if changed := [n for n, q in _tensors(twin).items() if not torch.equal(q, fresh[n])]:
                return f"its forward changes {changed[0]}"
            for name in tensors.keys() & {form.weight, form.bias}:
                tensors[name].mul_(factor)
            inputs = [factor * x for x in inputs]
            off = _deviation(form, twin, inputs, _outputs(twin, inputs, seed))
        except Exception as problem:
            return f"{when} it raises {type(problem).__name__}"
        if not off < _TOLERANCE:
            title = f"it does not compute {_TITLES[form.kind]} norm {when}"
            return f"{title}: on a random input it is {off:.2g} off"
    return ""


def _outputs(twin: Any, inputs: list[Tensor], seed: int = 0) -> list[Any]:
    with _probing(seed):
        return [twin.forward(x.clone()) for x in inputs]


@contextmanager
def _probing(seed: int = 0) -> Iterator[None]:
    """Try a module without a graph, a warning or a change of the random state."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)  # of the CPU alone
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield


def find_batch_reason(module: nn.Module, spatial: tuple[int, ...] = (3, 2, 1)) -> str:
    """Return why a module is no batch norm in training and in evaluation; empty if it is one."""
    dims = next((n for n, cls in _BATCH_NORMS.items() if isinstance(module, cls)), 2)
    if not isinstance(module, _BatchNorm):
        return "it is not a subclass of nn.BatchNorm1d, 2d or 3d"
    if module._modules:
        return f"it has modules in it ({', '.join(module._modules)})"
    twin = _twin_of(module)
    if twin.running_var is not None:
        twin.running_var.abs_()
    plain = copy.copy(twin)
    vars(plain)["_buffers"] = {n: q if q is None else q.clone() for n, q in twin._buffers.items()}
    plain.__class__ = _BATCH_NORMS[dims]
    generator, no_norm = torch.Generator().manual_seed(1), "it does not compute a batch norm"
    for training in (True, True, False):  # few values a channel, where Bessel's factor counts
        x = torch.randn(2, module.num_features, *spatial[:dims], generator=generator) + 0.5
        twin.training = plain.training = training
        try:
            with _probing():
                found = {"output": twin.forward(x), **vars(twin)["_buffers"]}
                expected = {"output": plain.forward(x), **vars(plain)["_buffers"]}
            expected = {name: q for name, q in expected.items() if q is not None and q.dim()}
        except Exception as problem:
            if dims == 1 and spatial:
                return find_batch_reason(module, ())
            line = str(problem).partition("\n")[0]
            return f"{no_norm}: {type(problem).__name__}: {line}"
        for name, value in expected.items():
            other: Any = found[name]
            if getattr(other, "shape", None) != value.shape:
                return f"{no_norm}: its {name} is not a tensor of that shape"
            off = float((other.double() - value).abs().max() / value.abs().max().clamp_min(1e-9))
            if not off < _TOLERANCE:
                mode = "training" if training else "evaluation"
                return f"{no_norm}: its {name} in {mode} is {off:.2g} off"
    return ""


def _output_dtype(twin: Any, learned: torch.dtype, input: Tensor) -> torch.dtype | None:
    """Return the dtype of the output with parameters of a dtype, None where it cannot be."""
    other = copy.copy(twin)
    for stored in ("_parameters", "_buffers"):
        cast = {name: q if q is None else q.to(learned) for name, q in vars(twin)[stored].items()}
        vars(other)[stored] = cast
    try:
        with _probing():
            return other.forward(input).dtype  # type: ignore[no-any-return]
    except Exception:
        return None


def _twin_of(module: nn.Module) -> Any:
    """Return a copy with random parameters on the CPU, whatever those of the module are."""
    twin, generator = copy.copy(module), torch.Generator().manual_seed(0)

    def random(q: Tensor | None) -> Tensor | None:
        if q is None:
            return None
        if not q.is_floating_point() or (q.dim() == 0 and not isinstance(q, nn.Parameter)):
            return torch.zeros(q.shape, dtype=q.dtype) if q.is_meta else q.detach().cpu().clone()
        return torch.randn(q.shape, generator=generator) + 0.5

    for stored in ("_parameters", "_buffers"):
        vars(twin)[stored] = {name: random(q) for name, q in vars(module)[stored].items()}
    children = {n: nn.Tanh() if n == "act" else nn.Softsign() for n in module._modules}
    vars(twin).update(_modules=children, training=False)
    return twin


def _tensors(twin: nn.Module) -> dict[str, Tensor]:
    return {n: q for n, q in {**twin._parameters, **twin._buffers}.items() if q is not None}


def _input_shapes(twin: Any) -> Iterator[tuple[bool, tuple[int, ...]]]:
    dim = getattr(twin, "dim", 6)
    found = [_own_sizes(twin)] if _own_sizes(twin) else [*map(_sizes, _tensors(twin).values())]
    for sizes in dict.fromkeys([*filter(None, found)] or [(dim if isinstance(dim, int) else 6,)]):
        yield from ((False, (*others, *sizes)) for others in ((2, 3), (2, 3, 5), (4,)))
        if len(sizes) == 1:
            yield from ((True, (2, *sizes, *others)) for others in ((3, 4), (5,), (2, 3, 4)))
    for q in _tensors(twin).values():  # as of (heads, 1, features)
        yield False, (3, *(4 if n == 1 else n for n in q.shape))


def _candidates(twin: Any, kinds: tuple[NormKind, ...], first: bool) -> Iterator[NormForm]:
    tensors = _tensors(twin)
    # A pruned weight is no parameter.
    usual = tuple(x if isinstance(getattr(twin, x, None), Tensor) else None for x in _USUAL)
    affines = dict.fromkeys([usual, *permutations([*tensors, None, None], 2)])
    kinds_of_eps = (float, int, type(None))
    named = [x for x, v in vars(twin).items() if EPS_NAME.search(x) and type(v) in kinds_of_eps]
    named += [float(q) for q in twin._buffers.values() if q is not None and q.dim() == 0]
    activates = set(twin._modules) == ACTIVATION
    for affine, kind, offset, apart in product(affines, kinds, (0.0, 1.0), (False, True)):
        if offset == 0 or affine[0] is not None:
            for eps in (*named, *_FIXED_EPS):
                yield NormForm(kind, first, offset, eps, apart, activates, *affine)


def _deviation(form: NormForm, twin: Any, inputs: list[Tensor], found: list[Any]) -> float:
    """Return how far the outputs are from what the form says, at most, in parts of their size."""
    weight, bias = form.affine_of(twin)
    weight = weight if weight is None else weight + form.offset
    sizes, worst = form.sizes_of(twin)[-1:] if form.apart else form.sizes_of(twin), 0.0
    dims = tuple(range(-max(1, len(sizes)), 0))
    eps = _FLOAT32 if (own := form.eps_of(twin)) is None else own
    for input, output in zip(inputs, found, strict=True):
        x = input.movedim(1, -1).double() if form.channels_first else input.double()
        x = x - x.mean(dims, True) if form.kind == "layer" else x
        try:
            affine = (weight, bias) if form.apart else _flatten(weight, bias, sizes or x.shape[-1:])
            y = _give_affine(x / (x.square().mean(dims, True) + eps).sqrt(), *affine)
        except RuntimeError:  # a weight that does not fit this form
            return float("inf")
        y = y.movedim(-1, 1) if form.channels_first else y
        y = softsign(y).tanh() if form.activates else y
        if not isinstance(output, Tensor) or not output.shape == y.shape == input.shape:
            return float("inf")
        worst = max(float((output.double() - y).abs().max() / y.abs().max()), worst)
        if not worst < 0.01:  # also of what is no number; another eps does not mend it
            break
    return worst if worst < float("inf") else float("inf")


def _give_affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias

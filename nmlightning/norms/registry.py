"""The norms by name: which layer class each one is, for batch, layer and RMS normalisation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, cast

from torch import nn

from nmlightning.errors import InputError, check_choice, check_lists, nearest
from nmlightning.kernels.interface import Fused, NormKind
from nmlightning.norms import batch_norm, low_precision, mean_only
from nmlightning.norms.batch_norm_base import default_options
from nmlightning.norms.layer_norm import L1LayerNorm, L1RMSNorm, LpLayerNorm, LpRMSNorm
from nmlightning.norms.norm_free import DynamicErf, DynamicTanh, RMSDynamicErf, RMSDynamicTanh
from nmlightning.norms.scaled import ScaledLayerNorm, ScaledRMSNorm

KINDS: tuple[NormKind, ...] = ("batch", "layer", "rms")
TITLES: Mapping[NormKind, str] = MappingProxyType(
    {"batch": "batch", "layer": "layer", "rms": "RMS"}
)


@dataclass(frozen=True)
class Norm:
    """One name: its batch norms by dimensions (None: any number), its others, fixed options."""

    batch: Mapping[int | None, type[nn.Module]]
    layer: type[nn.Module] | None = None
    rms: type[nn.Module] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _batch_norms(name: str, home: ModuleType = batch_norm) -> dict[int | None, type[nn.Module]]:
    return {
        None: getattr(home, f"{name}BatchNorm"),
        **{dims: getattr(home, f"{name}BatchNorm{dims}d") for dims in (1, 2, 3)},
    }


_TOP_K = _batch_norms("TopK")

NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "l2": Norm(
            {None: nn.SyncBatchNorm, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
            nn.LayerNorm,
            nn.RMSNorm,
        ),
        "l1": Norm(_batch_norms("L1"), L1LayerNorm, L1RMSNorm),
        "lp": Norm(_batch_norms("Lp"), LpLayerNorm, LpRMSNorm),
        "linf": Norm(_batch_norms("LInf")),
        "topk": Norm(_TOP_K),
        "top10": Norm(_TOP_K, fixed={"k": 10}),
        "range": Norm(_batch_norms("Range")),
        "mean": Norm(_batch_norms("MeanOnly", mean_only)),
        "half_l2": Norm(_batch_norms("HalfL2", low_precision)),
        "scaled": Norm({}, ScaledLayerNorm, ScaledRMSNorm),
        "dyt": Norm({}, DynamicTanh, RMSDynamicTanh),
        "derf": Norm({}, DynamicErf, RMSDynamicErf),
    }
)


def find_norm(name: str) -> Norm:
    """Return the norm called `name`, or raise InputError with the names there are."""
    return NORMS[norm_name(name)]


def norm_name(name: str) -> str:
    """Return the name as NORMS has it, of "L1" "l1", or raise InputError for an unknown one."""
    known = name.lower() if isinstance(name, str) else ""
    if known not in NORMS:
        raise InputError(
            f"There is no norm {name!r}; there are {', '.join(NORMS)}.{nearest(str(name), NORMS)}"
        )
    return known


def layer_class(name: str, kind: NormKind, dims: int | None = None) -> type[nn.Module]:
    """Return the class of norm `name` for a kind; for `batch` by its spatial dimensions or None."""
    cls = _by_kind(find_norm(name), kind, dims)
    if cls is None:
        defined = [other for other, spec in NORMS.items() if _by_kind(spec, kind) is not None]
        raise InputError(
            f"The norm {name!r} is not defined for {TITLES[kind]} norms; {', '.join(defined)} are."
        )
    return cls


def find_class(class_name: str) -> tuple[str, NormKind]:
    """Return the name and the kind of the norm whose class has a name, or raise InputError."""
    for name, norm in NORMS.items():
        classes = {"batch": norm.batch.values(), "layer": [norm.layer], "rms": [norm.rms]}
        for kind in KINDS:
            if class_name in {getattr(cls, "__name__", None) for cls in classes[kind]}:
                return name, kind
    raise InputError(f"There is no norm class {class_name!r}: install the release that has it.")


def _by_kind(norm: Norm, kind: NormKind, dims: int | None = None) -> type[nn.Module] | None:
    if kind == "batch":
        return norm.batch.get(dims)
    return norm.layer if kind == "layer" else norm.rms


def check_kinds(kinds: str | Sequence[str]) -> tuple[NormKind, ...]:
    """Return the kinds, of which one may be given as a string, or raise InputError."""
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    check_lists(kinds=kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"kinds are {', '.join(KINDS)}, got {kind!r}.{nearest(kind, KINDS)}")
    if not kinds:
        raise InputError(f"kinds is empty: name {', '.join(KINDS)} or several.")
    return tuple(kinds)  # type: ignore[arg-type]


def path_of(cls: type) -> str:
    """Return the path of a class, as `types` has it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_types(types: Mapping[Any, str] | None) -> dict[str, NormKind]:
    """Return the kinds of classes by their paths, or raise InputError for another kind."""
    types = types or {}
    if not isinstance(types, Mapping) or not all(isinstance(x, str | type) for x in types):
        raise InputError(
            "types maps classes or their paths to 'batch', 'layer' or 'rms', such as "
            f"{{'my.package.MyNorm': 'rms'}}, got {types!r}."
        )
    kinds = {path_of(x) if isinstance(x, type) else x: kind for x, kind in types.items()}
    for path, kind in kinds.items():
        check_choice(f"The kind of {path} in types", kind, KINDS)
    return kinds  # type: ignore[return-value]


def check_options(name: str, kind: NormKind, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of norm `name` with its fixed ones, or raise InputError."""
    norm = find_norm(name)
    if not isinstance(options, Mapping):
        raise InputError(f"options map names to values, such as {{'eps': 1e-5}}, got {options!r}.")
    allowed = default_options(layer_class(name, kind)).keys()
    for option in options:
        if option in norm.fixed:
            raise InputError(f"The norm {name!r} has {option} = {norm.fixed[option]} by its name.")
        if option not in allowed:
            known = ", ".join(sorted(allowed - norm.fixed.keys()))
            raise InputError(
                f"The norm {name!r} has no option {option!r} for {TITLES[kind]} norms; it has "
                f"{known}.{nearest(str(option), allowed)}"
            )
    return {**norm.fixed, **options}


def check_fuse(fuse: str | None, norm: str, kinds: Iterable[NormKind]) -> Fused | None:
    """Return what is to be fused, or raise InputError if norms of these kinds cannot be."""
    if fuse is None:
        return None
    check_choice("fuse", fuse, ("relu", "add_relu"))
    if norm == "l2":
        raise InputError("fuse is for norms of this package: 'l2' is torch's own, give fuse=None.")
    if "batch" not in kinds:
        raise InputError(f"fuse is for batch norms, and kinds is {tuple(kinds)}: give fuse=None.")
    return cast(Fused, fuse)

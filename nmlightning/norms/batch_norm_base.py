"""The base of all batch norms: settings, checks, ranks and running statistics."""

import inspect
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from numbers import Integral, Real
from traceback import walk_stack
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.distributed import ProcessGroup
from torch.fx import Proxy
from torch.jit._trace import TracerWarning
from torch.nn.modules.batchnorm import _BatchNorm

from nmlightning.errors import (
    InputError,
    check_flag,
    check_whole_number,
    describe_arguments,
    is_number,
    nearest,
)
from nmlightning.functional.plain import plain_evaluation
from nmlightning.functional.reductions import constant_in_traces, is_eager, is_half, is_transformed
from nmlightning.kernels.dispatch import NO_KERNELS, select_tracking
from nmlightning.kernels.interface import Dispatch, Fused

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATS_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
RUNNING = ("running_mean", "running_var")
INPUT_DIMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
# What a swapped layer takes from the layer that it replaces, and so is no option of a swap.
INHERITED = {"num_features", "normalized_shape", "affine", "elementwise_affine", "bias"}
INHERITED |= {"track_running_stats", "device", "dtype", "process_group"}
CONVERTS = re.compile("convert.*(sync|split)_?b", re.IGNORECASE)
_FUSES_EXACT_CLASSES = ("torch.fx.experimental.optimization", "torch.ao.quantization")


def activate(y: Tensor, residual: Tensor | None, fused: Fused | None) -> Tensor:
    """Return y, ReLU(y) or ReLU(y + residual), as `fused` says; y may be used up."""
    if fused is None:
        return y
    y = y if residual is None else y + residual
    return F.relu(y, inplace=is_eager(y))  # y is nobody else's


@constant_in_traces
def warn_of_export(name: str) -> None:
    """Warn of an export in training mode, also where the compiler traces the call."""
    warnings.warn(
        f"{name} is exported in training mode and will always normalise by the batch's own "
        "statistics, whatever is done to the exported model: call eval() before the export.",
        stacklevel=3,
    )


def check_residual(residual: Tensor | None, fused: Fused | None) -> None:
    """Raise InputError unless there is a residual exactly where one is to be added."""
    if residual is None and fused == "add_relu":
        raise InputError(
            "A norm with fused='add_relu' adds a residual, its second argument, and got none: call "
            "it by the module that it was fused in, or swap again without fuse."
        )
    if residual is not None and fused != "add_relu":
        raise InputError(f"A norm with fused={fused!r} adds no residual, and got one.")


def check_eps(eps: float) -> float:
    """Return eps if it is finite and at least 0, or raise InputError."""
    if not (is_number(eps) and 0 <= eps < math.inf):
        raise InputError(f"eps must be finite and at least 0, got {eps!r}.")
    return float(eps)


def check_momentum(momentum: float | None) -> float | None:
    """Return the momentum if it is None or within 0 … 1, or raise InputError."""
    if momentum is None or (is_number(momentum) and 0 <= momentum <= 1):
        return momentum
    raise InputError(f"momentum must be between 0 and 1, or None, got {momentum!r}.")


def check_stats_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype, which may be given by its name as in YAML, or raise InputError."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in STATS_DTYPES:
        raise InputError(
            f"stats_dtype is None or one of {', '.join(STATS_DTYPES)}, got {name!r}."
            f"{nearest(name, STATS_DTYPES)}"
        )
    return STATS_DTYPES[name]


def accumulation_dtype(input_dtype: torch.dtype, stats_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that statistics accumulate in: at least float32, at least the input's.

    Unless a half one is asked for, in which all is then computed. InputError for an input of whole
    or complex numbers, which no norm here is defined for.
    """
    if not input_dtype.is_floating_point:
        raise InputError(f"expected an input of real floating-point numbers, got {input_dtype}.")
    if stats_dtype is not None and is_half(stats_dtype):
        return stats_dtype
    return torch.promote_types(input_dtype, stats_dtype or torch.float32)


def describe_settings(layer: nn.Module, shape: str) -> str:
    """Return `shape` and the layer's other arguments, as torch's norms do."""
    known = {}
    if hasattr(layer, "bias"):  # a flag of the constructor, a parameter of the layer
        known["bias"] = layer.bias is not None or layer.weight is None
    return f"{shape}, {describe_arguments(layer, 1, known)}"


def describe_norm(layer: nn.Module) -> dict[str, Any] | None:
    """Return which class of this package a norm is, and its options, as plain data; None: none."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("nmlightning.norms."):
            options = default_options(cls).items()
            values = {name: as_plain(getattr(layer, name, value)) for name, value in options}
            return {"norm": cls.__name__, "options": values}
    return None


def default_options(cls: type) -> dict[str, Any]:
    """Return the options that a swap to a norm of such a class has, and their defaults."""
    arguments = inspect.signature(cls).parameters.values()
    return {x.name: x.default for x in arguments if x.name not in INHERITED}


def as_plain(value: Any) -> Any:
    """Return an option as what every checkpoint may hold: also a dtype, and numpy's numbers."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return str(value).removeprefix("torch.")


def note_norm(layer: nn.Module, state_dict: Any, prefix: str) -> None:
    """Say in the metadata of a state dict, beside torch's version, what norm a layer is."""
    metadata = getattr(state_dict, "_metadata", {})
    metadata.setdefault(prefix[:-1], {})["nmlightning"] = describe_norm(layer)


class BatchNormBase(_BatchNorm):
    """A batch norm with torch's state, whose evaluation is torch's; a subclass says how it trains.

    Running statistics stay float32 where the layer is made half. Arguments, errors and what is done
    with statistics that are not finite are those of `StatisticBatchNorm`, but for the constant.
    """

    input_dims: ClassVar[tuple[int, ...]] = ()  # any, or those of torch's class that it is
    has_scale: ClassVar[bool] = True
    process_group: ProcessGroup | None = None
    fused: Fused | None = None  # what the layer also does, see `swap_norms`

    def __init_subclass__(cls) -> None:
        cls.input_dims = next((n for base, n in INPUT_DIMS.items() if issubclass(cls, base)), ())

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, *, bias: bool = True,
        stats_dtype: torch.dtype | str | None = None, sync: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            check_whole_number("num_features", num_features),
            check_eps(eps),
            check_momentum(momentum),
            check_flag("affine", affine),
            check_flag("track_running_stats", track_running_stats),
            device=device,
            dtype=dtype,
        )
        if not check_flag("bias", bias):  # Torch 2.11 has no such argument.
            self.register_parameter("bias", None)
        self.stats_dtype = check_stats_dtype(stats_dtype)
        self.sync = check_flag("sync", sync)
        self.keep_statistics_wide()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the normalised (N, C, *) input, in its dtype and memory format.

        Where the layer is `fused`, what follows it is done, too: ReLU(y) or ReLU(y + residual).
        """
        # TorchScript compiles nothing of the other branches.
        if is_scripting():
            output = self.evaluate_scripted(input)
        elif isinstance(input, Proxy):
            output = self._record(input, residual)
        elif torch._C._is_tracing():
            with warnings.catch_warnings():  # a trace holds for other batches where torch's does
                warnings.simplefilter("ignore", TracerWarning)
                self._check_onnx()
                output = self._compute(input, residual)
        else:
            output = self._compute(input, residual)
        return output

    def evaluate_scripted(self, input: Tensor) -> Tensor:
        """Return the evaluated norm, by what TorchScript and torch.fx can read."""
        if self.training:
            raise RuntimeError("A scripted batch norm of nmlightning only evaluates: call eval().")
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def __prepare_scriptable__(self) -> "BatchNormBase":
        """Refuse, for `torch.jit.script`, what it cannot compile."""
        if self.training or self.running_mean is None or self.fused is not None:
            raise InputError(
                f"torch.jit.script takes {type(self).__name__} in evaluation, with running "
                "statistics and not fused: call eval(), and swap_norms without fuse."
            )
        return self

    def _check_onnx(self) -> None:
        if self.training and torch.onnx.is_in_onnx_export():
            raise InputError(
                f"ONNX has no {type(self).__name__} in training: call eval() and leave training= "
                "out, or export with dynamo=True, which writes the formula."
            )

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children's names and modules; InputError if they are to be another norm's."""
        caller = sys._getframe(1).f_code.co_name
        if CONVERTS.search(caller):
            switch = "its sync is on" if self.sync else 'set its sync, by {"sync": True}'
            raise InputError(
                f"{caller} would make an L2 norm of this {type(self).__name__}, which synchronises "
                f"itself: do not call it ({switch}), or revert the swap first."
            )
        return super().named_children()

    def _record(self, input: Any, residual: Tensor | None) -> Any:
        """Record one call of the layer in a torch.fx trace, as of torch's own norms."""
        tracer: Any = input.tracer
        if tracer.root is self:
            return self.evaluate_scripted(input)
        frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_stack(None))
        for caller in (name for name in frames if name.startswith(_FUSES_EXACT_CLASSES)):
            warnings.warn(
                f"{caller} fuses torch's own classes only, not {type(self).__name__}: "
                'call fold_norms(model), or swap_norms(model, "l2") first.',
                stacklevel=2,
            )
            break
        arguments = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})

    def _compute(self, input: Tensor, residual: Tensor | None) -> Tensor:
        whole = self.training or self.running_mean is None
        if whole and (output := self._at_once(input, residual)) is not None:
            return output
        self._check_input_dim(input)
        check_residual(residual, self.fused)
        if not whole:
            return activate(self._evaluate(input), residual, self.fused)
        if self.training and torch.compiler.is_exporting():
            warn_of_export(type(self).__name__)
        group = self._group()
        if group is None and input.numel() <= input.shape[1]:
            # Torch's own answers for an empty batch and for one value per channel.
            y = F.batch_norm(input, None, None, self.weight, self.bias, training=True)
            if self.training and self.num_batches_tracked is not None and self.momentum is not None:
                self.num_batches_tracked.add_(1)
            return activate(y, residual, self.fused)
        output, mean, variance = self._normalise(input, residual, group)
        if self.training and self.track_running_stats:
            self._track(mean, variance)
        return output

    def backend_for(self, input: Tensor) -> Dispatch:
        """Return the backend that computes such an input in training, and why, without running."""
        return NO_KERNELS

    def keep_statistics_wide(self) -> None:
        """Make running statistics that are half float32, as casting the layer leaves them."""
        for name in RUNNING:
            running = getattr(self, name)
            if running is not None:
                setattr(self, name, running.to(torch.promote_types(running.dtype, torch.float32)))

    def reset_parameters(self) -> None:
        """Reset all parameters and statistics; torch 2.11's own needs a bias."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the arguments, so that the repr evaluates, and what `swap_norms` fused."""
        settings = describe_settings(self, str(self.num_features))
        return settings if self.fused is None else f"{settings}, fused={self.fused!r}"

    def _evaluate(self, input: Tensor) -> Tensor:
        weight = self.weight if self.has_scale else None
        tensors: list[Any] = [self.running_mean, self.running_var, weight, self.bias]
        if torch.compiler.is_compiling() and is_transformed():
            return plain_evaluation(input, self.eps, *tensors)
        mean, variance, weight, bias = tensors
        if is_half(input.dtype):  # which torch takes with parameters of the statistics' dtype
            weight, bias = (q if q is None else q.to(mean.dtype) for q in (weight, bias))
        return F.batch_norm(input, mean, variance, weight, bias, eps=self.eps)

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchNormBase":
        """Move and cast the layer, but keep running statistics at float32 or wider."""
        wide = {name: getattr(self, name) for name in RUNNING}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
            after = getattr(self, name)
            if after is not None and is_half(after.dtype) and not is_half(before.dtype):
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_norm(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        *arguments: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        self.keep_statistics_wide()  # with assign=True they are now what another model had

    def _at_once(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """Return the output by one call, which tracks, too; or None, and nothing has been done."""
        return None

    def _normalise(
        self, input: Tensor, residual: Tensor | None, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output for (N, C, *), and the mean and the variance (C,) to be tracked."""
        raise NotImplementedError

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards the batch's, in channels where both are finite."""
        if self.running_mean is None or self.running_var is None:
            return
        running, track = (self.running_mean, self.running_var), select_tracking(mean)
        if not (track and track(*running, self.num_batches_tracked, mean, variance, self.momentum)):
            self._track_by_formula(tuple(zip(running, (mean, variance), strict=True)))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            torch.empty(0, requires_grad=True).square()  # saved: a checkpoint recomputes up to here

    @torch.no_grad()
    def _track_by_formula(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        (_, mean), (_, variance) = pairs
        finite = torch.maximum(mean.abs(), variance) < math.inf  # isfinite() takes four operations
        # Without a momentum channels have one count, so a batch counts for all or none.
        finite = finite.all() if self.momentum is None else finite
        newest = self._count_batch(finite, mean.dtype)
        moved = [(run + newest * (value - run)).to(run.dtype) for run, value in pairs]
        if mean.dtype == torch.float64:  # whose variance float32 may not hold: both move, or none
            finite = finite & (moved[1] < math.inf)
        for (running, _), value in zip(pairs, moved, strict=True):
            running.copy_(torch.where(finite & (value.abs() < math.inf), value, running))

    def _count_batch(self, finite: Tensor, dtype: torch.dtype) -> float | Tensor:
        """Count a batch, and return its weight in the running statistics."""
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        if self.momentum is not None:
            self.num_batches_tracked.add_(1)
            return self.momentum
        return 1.0 / self.num_batches_tracked.add_(finite).to(dtype)

    def _group(self) -> ProcessGroup | None:
        """Return the ranks to share statistics with, or None."""
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _check_input_dim(self, input: Tensor) -> None:
        if self.input_dims and input.dim() not in self.input_dims:
            expected = "D or ".join(map(str, self.input_dims))
            raise InputError(f"expected {expected}D input (got {input.dim()}D input)")
        if input.dim() < 2:
            raise InputError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] != self.num_features:
            raise InputError(
                f"{type(self).__name__} has {self.num_features} features, "
                f"got {input.shape[1]} channels in an input of shape {tuple(input.shape)}."
            )

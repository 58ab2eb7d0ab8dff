"""Convolutions and linear layers that train and evaluate in 8 bits or fewer."""

import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from nmlightning.errors import InputError, check_choice, check_flag
from nmlightning.int8 import backends
from nmlightning.int8.function import Int8Function, Settings
from nmlightning.int8.quantizer import Rounding, check_bits
from nmlightning.int8.ranges import (
    NOTE,
    RANGES,
    clear_range,
    input_grid,
    kept_wide,
    ranks_to_share_with,
    register_range,
    remove_range,
    this_rank,
)
from nmlightning.kernels.interface import Dispatch
from nmlightning.name_patterns import plain_name
from nmlightning.norms.batch_norm_base import check_momentum
from nmlightning.norms.fast_path import named_modules_in_encoder

WeightGradient = Literal["float32", "bfloat16"]
WeightRange = Literal["tensor", "channel"]
# Of an input to ask the backends with; torch._int_mm wants more than 16 rows.
_SAMPLES, _PLACES = 32, 32


class Int8Layer(nn.Module):
    """What the layers below share; by `isinstance` it finds them all.

        y = s_x · s_w · Σ (q_x − z_x)(q_w − z_w) + bias

    The input is quantised to the nearest number of a grid over the mean range of the batch's
    samples, in evaluation over the running mean of that range; the weight over ±max|w|, in each
    forward. The gradient of the output is quantised over its extremes, rounded stochastically, for
    the input's gradient only: those of the weight and the bias are taken from it as it is
    (bifurcation). Weights, biases, outputs and gradients are floating point. Evaluation draws no
    random numbers and depends on a sample's own values only, if all are finite. The state is
    torch's and `running_min`, `running_max` and `num_ranges_tracked`. All is 0 where a tensor is,
    and NaN where one holds a value that is not finite, which leaves the running range alone. Before
    any batch evaluation uses the range of its input. Of a second derivative there is none.

    In traced code, by `torch.compile`, all is computed by the formula, elsewhere in integers where
    the device can; `backend_for` and `describe_backends` tell.

    Its options are the keywords of `set_up`.

    Source: Banner et al. 2018 (arXiv 1805.11046).
    """

    weight: Tensor
    bias: Any  # a parameter, or None
    named_modules: Any = named_modules_in_encoder

    def set_up(
        self, bits: int = 8, gradient_bits: int = 8, rounding: Rounding = "stochastic",
        bifurcate: bool = True, weight_gradient: WeightGradient = "float32",
        weight_range: WeightRange = "tensor", momentum: float | None = 0.1, sync: bool = False,
    ) -> None:  # fmt: skip
        """Set the options, and add a running range if there is none; torch's layer lacks no more.

        Args:
            bits: of the input and the weight, 2 … 8.
            gradient_bits: of the output's gradient, 2 … 8.
            rounding: of that gradient, "stochastic" or "nearest". The random numbers are of torch's
                generator, and other ones on each rank.
            bifurcate: whether the weight's gradient is kept from being quantised.
            weight_gradient: the dtype that the weight's gradient is computed in, "float32" or
                "bfloat16", which is faster; the weight's gradient then has 8 bits of mantissa.
            weight_range: one scale for the "tensor", or for each output "channel".
            momentum: of the newest batch in the running range; None averages all equally. The first
                batch counts whole.
            sync: share the ranges of a batch and of its gradient among all ranks.

        Raises:
            InputError: a setting outside what is allowed.
        """
        check_choice("rounding", rounding, ("stochastic", "nearest"))
        check_choice("weight_gradient", weight_gradient, ("float32", "bfloat16"))
        check_choice("weight_range", weight_range, ("tensor", "channel"))
        self.bits = check_bits("bits", bits)
        self.gradient_bits = check_bits("gradient_bits", gradient_bits)
        self.rounding, self.weight_gradient, self.weight_range = (
            rounding, weight_gradient, weight_range,
        )  # fmt: skip
        self.bifurcate = check_flag("bifurcate", bifurcate)
        self.momentum = check_momentum(momentum)
        self.sync = check_flag("sync", sync)
        if RANGES[0] not in self._buffers:
            register_range(self)

    def int8_options(self) -> dict[str, Any]:
        """Return the options as plain data: the keywords of `set_up`."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def forget_options(self) -> None:
        """Remove what `set_up` added, before the layer becomes torch's again."""
        remove_range(self)
        for name in _OPTIONS:
            delattr(self, name)

    def backend_for(self, input: Tensor) -> Dispatch:
        """Return what computes the output of such a (N, C, *) input, and why, without running."""
        return backends.select_backend(self._operation(), input, self.weight)

    def _operation(self) -> backends.Operation:
        raise NotImplementedError

    def _multiply(self, input: Tensor, rows: Tensor) -> Tensor:
        """Return the product of the input, of which `rows` is a view (N, C, *)."""
        if not input.is_floating_point():
            raise InputError(f"{type(self).__name__} takes floating inputs, got {input.dtype}.")
        device = input.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        is_double = input.dtype == torch.float64  # which autocast leaves alone
        group = ranks_to_share_with(self, self.sync)
        grid = input_grid(self, input, self.bits, self.momentum, group)
        settings = Settings(
            self._operation(), self.bits, self.weight_range == "channel", self.gradient_bits,
            self.rounding, self.bifurcate, getattr(torch, self.weight_gradient),
            torch.get_autocast_dtype(device) if casts and not is_double else input.dtype, group,
            this_rank(),
        )  # fmt: skip
        y: Tensor = Int8Function.apply(
            rows, self.weight, self.bias, grid.scale, grid.zero_point, settings
        )
        return y

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Layer":
        """Move and cast the layer, but keep the running range in float32."""
        with kept_wide(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        """Reset the parameters as torch does, and forget the running range."""
        super().reset_parameters()  # type: ignore[misc]
        clear_range(self)

    def extra_repr(self) -> str:
        """Return torch's, and the options that are not the default."""
        own = self.int8_options().items()
        shown = (f"{name}={value!r}" for name, value in own if value != _OPTIONS[name])
        return ", ".join([super().extra_repr(), *shown])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})[NOTE] = self.int8_options()


_OPTIONS = {
    option.name: option.default
    for option in inspect.signature(Int8Layer.set_up).parameters.values()
    if option.default is not option.empty
}


class Int8Conv(Int8Layer):
    """A convolution in int8; use `Int8Conv1d`, `Int8Conv2d` or `Int8Conv3d`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any  # as torch has it
    in_channels: int
    out_channels: int
    _reversed_padding_repeated_twice: list[int]  # of each side, the last dimension first

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1, padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, *, bits: int = 8, gradient_bits: int = 8,
        rounding: Rounding = "stochastic", bifurcate: bool = True,
        weight_gradient: WeightGradient = "float32", weight_range: WeightRange = "tensor",
        momentum: float | None = 0.1, sync: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_up(
            bits, gradient_bits, rounding, bifurcate, weight_gradient, weight_range, momentum, sync
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return the (N, O, *) convolution of (N, C, *), or of (C, *), in its dtype."""
        if 0 in (self.in_channels, self.out_channels):  # no weight has a range
            return super().forward(input)  # type: ignore[no-any-return]
        dims = self.weight.dim()
        if input.dim() not in (dims - 1, dims) or input.shape[1 - dims] != self.in_channels:
            raise InputError(
                f"{type(self).__name__} takes (N, {self.in_channels}, *) inputs of {dims} "
                f"dimensions, or one sample of these, got {tuple(input.shape)}."
            )
        batch = input if input.dim() == dims else input.unsqueeze(0)
        padded = self._padded(batch)
        kernel, sizes = self.weight.shape[2:], padded.shape[2:]
        if min(self._operation().output_size(sizes, kernel)) < 1:
            raise InputError(
                f"{type(self).__name__}'s kernel {tuple(kernel)} is larger than its padded input, "
                f"{tuple(sizes)} before padding."
            )
        y = self._multiply(batch, padded)
        return y if input.dim() == dims else y.squeeze(0)

    def _pads_by_itself(self) -> bool:
        pads = self._reversed_padding_repeated_twice
        return self.padding_mode == "zeros" and pads[::2] == pads[1::2]

    def _padded(self, batch: Tensor) -> Tensor:
        """Return the batch with the padding that a convolution does not do itself."""
        if self._pads_by_itself():
            return batch
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(batch, self._reversed_padding_repeated_twice, mode)

    def _operation(self) -> backends.Convolution:
        none = (0,) * len(self.stride)
        pads = self._reversed_padding_repeated_twice
        padding = tuple(pads[::-2]) if self._pads_by_itself() else none
        return backends.Convolution(self.stride, padding, self.dilation, self.groups)


class Int8Conv1d(Int8Conv, nn.Conv1d):
    """`nn.Conv1d` in int8; see `Int8Layer`."""


class Int8Conv2d(Int8Conv, nn.Conv2d):
    """`nn.Conv2d` in int8; see `Int8Layer`.

    Examples:
        >>> layer = Int8Conv2d(16, 32, 3, padding=1, gradient_bits=4)
        >>> layer(torch.randn(8, 16, 7, 7)).shape
        torch.Size([8, 32, 7, 7])
    """


class Int8Conv3d(Int8Conv, nn.Conv3d):
    """`nn.Conv3d` in int8; see `Int8Layer`."""


class Int8Linear(Int8Layer, nn.Linear):
    """`nn.Linear` in int8; see `Int8Layer`.

    Examples:
        >>> Int8Linear(16, 32)(torch.randn(8, 5, 16)).shape
        torch.Size([8, 5, 32])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        bits: int = 8, gradient_bits: int = 8, rounding: Rounding = "stochastic",
        bifurcate: bool = True, weight_gradient: WeightGradient = "float32",
        weight_range: WeightRange = "tensor", momentum: float | None = 0.1, sync: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_up(
            bits, gradient_bits, rounding, bifurcate, weight_gradient, weight_range, momentum, sync
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return the (N, *, O) product of (N, *, C), or of (C,), in its dtype."""
        if 0 in (self.in_features, self.out_features):  # no weight has a range
            return super().forward(input)
        if not input.dim() or input.shape[-1] != self.in_features:
            raise InputError(
                f"{type(self).__name__} takes inputs of {self.in_features} features, "
                f"got {tuple(input.shape)}."
            )
        batch = input if input.dim() > 1 else input.unsqueeze(0)
        y = self._multiply(batch, batch.reshape(-1, self.in_features))
        return y.view(*input.shape[:-1], self.out_features)

    def _operation(self) -> backends.MatrixProduct:
        return backends.MatrixProduct()


INT8_CLASSES: Mapping[type[nn.Module], type[Int8Layer]] = MappingProxyType(
    {
        nn.Conv1d: Int8Conv1d,
        nn.Conv2d: Int8Conv2d,
        nn.Conv3d: Int8Conv3d,
        nn.Linear: Int8Linear,
    }
)
"""What each of torch's classes is in int8: an object becomes it by its `__class__` and `set_up`."""


def describe_backends(model: nn.Module) -> dict[str, tuple[Dispatch, Dispatch]]:
    """Return, for each int8 layer by name, what computes its output and its input's gradient.

    As of now, for large float32 batches on the weight's device.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Layer):
            weight, operation = layer.weight.detach(), layer._operation()
            groups = operation.groups if isinstance(operation, backends.Convolution) else 1
            kernel = weight.shape[2:]
            places = [k + _PLACES for k in kernel]
            shapes = [(_SAMPLES, weight.shape[1] * groups), (_SAMPLES, len(weight))]
            x, grad = (weight.new_empty(1).float().expand(*s, *places) for s in shapes)
            size = operation.spread_size(places, kernel)
            gradient = backends.select_gradient_backend(operation, grad, weight, size)[0]
            found[name] = backends.select_backend(operation, x, weight), gradient
    return found


_READS_WEIGHTS = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def find_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every layer that int8 is asked for, under each of its names, and why it cannot be.

    The reason is empty for a layer that is or can be in int8.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a torch.nn.Module, got {model!r}.")
    named: Iterator[tuple[str, nn.Module]] = model.named_modules(remove_duplicate=False)
    for name, module in named:
        if isinstance(module, (*INT8_CLASSES, _ConvTransposeNd, *_READS_WEIGHTS)):
            yield plain_name(name), module, _reason(module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return its class; of a parametrized or sharded module the one that it had before."""
    own = type(module)
    if isinstance(module, Int8Layer):
        return next(cls for cls in own.__mro__ if cls in INT8_CLASSES.values())
    return own.__bases__[0] if parametrize.is_parametrized(module) else own


def _reason(module: nn.Module) -> str:
    """Return why a layer stays in floating point, or nothing."""
    if isinstance(module, Int8Layer):
        return ""
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution"
    if isinstance(module, _READS_WEIGHTS):
        return "its own code reads its weights"
    if isinstance(module, LazyModuleMixin):
        return "not initialised, run one batch through it"
    if "forward" in vars(module):
        return "its forward was replaced on the object, where no class counts"
    return "" if class_of(module) in INT8_CLASSES else "a subclass, whose forward may be another"

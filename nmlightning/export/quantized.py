"""Layers and norms in 8 bits as torch's own between quantisers that ONNX and torch.export hold."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nmlightning.errors import InputError
from nmlightning.int8 import quantizer
from nmlightning.int8.layers import INT8_CLASSES, Int8Layer
from nmlightning.int8.norms import restore_norm
from nmlightning.int8.ranges import RANGES, holder_of
from nmlightning.name_patterns import some

_LARGEST_BIAS = 2**30  # in units of both scales; with what is added to it an int32 holds it
_LEAST_SCALE = 2**-60  # times an input's, far above the smallest normal number


@dataclass(frozen=True)
class QuantizedModule:
    """A layer or norm, the grid of its input, and of a layer the weight, q − z and its scale."""

    module: nn.Module
    input: quantizer.Grid
    weight: Tensor | None = None
    scale: Tensor | None = None


def find_quantized(net: nn.Module) -> dict[str, nn.Module]:
    """Return the layers and norms with quantised inputs by name."""
    return {name: module for name, module in net.named_modules() if holder_of(module) is not None}


def _make_plain(layer: Any) -> None:
    layer.forget_options()
    layer.__class__ = next(plain for plain in INT8_CLASSES if isinstance(layer, plain))


@torch.no_grad()
def extract_quantizers(net: nn.Module) -> list[QuantizedModule]:
    """Make torch's classes of the layers in 8 bits, for `fold_norms`, and return what they lost.

    Their weights become 1, so that a fold leaves there the factor of each output channel: a scale
    takes that, and q stays. Norms stay quantised, which no fold can do. Weights of b bits are
    multiples of 2^(8−b), which leaves them what they are and makes their scale smaller: onnxruntime
    rounds biases to multiples of both scales.

    Raises:
        InputError: the range of an input is not known.
    """
    found = find_quantized(net)
    unknown = [name for name, module in found.items() if not module.num_ranges_tracked]
    if unknown:
        raise InputError(
            f"{some(unknown)} saw no batch in training, so the range of the inputs is not known: "
            "train the network first."
        )
    return [_extract_quantizer(module) for module in found.values()]


def _extract_quantizer(module: Any) -> QuantizedModule:
    bits = holder_of(module).bits
    low, high = (getattr(module, name) for name in RANGES)
    grid = quantizer.make_grid(low, high, bits)
    if not isinstance(module, Int8Layer):
        return QuantizedModule(module, grid)
    weight = quantizer.symmetric_grid(module.weight, bits, module.weight_range == "channel")
    whole = quantizer.centre(quantizer.quantize(module.weight, weight), weight, torch.int8)
    _make_plain(module)
    module.weight = nn.Parameter(torch.ones_like(module.weight))
    spread = 2 ** (8 - bits)
    return QuantizedModule(module, grid, whole * spread, weight.scale.flatten() / spread)


@torch.no_grad()
def insert_quantizers(modules: list[QuantizedModule]) -> None:
    """Quantise the inputs again, by a hook, and let the layers hold their weights as int8."""
    for each in modules:
        module: Any = each.module
        if each.weight is None or each.scale is None:
            restore_norm(module)
        else:
            factor = module.weight.flatten(1)[:, 0]
            weight, scale = _with_room(each.weight, each.scale * factor, module.bias, each.input)
            del module.weight
            module.register_buffer("weight", weight)
            parametrize.register_parametrization(module, "weight", _Weight(scale), unsafe=True)
        module.register_forward_pre_hook(_InputQuantizer(each.input))


def _with_room(
    whole: Tensor, scale: Tensor, bias: Tensor | None, grid: quantizer.Grid
) -> tuple[Tensor, Tensor]:
    """Return a weight and its scales (O,), none too small for a runtime with an int32 bias.

    That is the bias over both scales; onnxruntime makes it so, and lets it saturate. Where a norm
    left nearly nothing of a channel, its weight is rounded to more: 2^-31 of the bias is lost.
    """
    least = scale.new_tensor(_LEAST_SCALE)
    if bias is not None:
        least = torch.maximum(least, bias.abs() / grid.scale / _LARGEST_BIAS)
    is_small = scale.abs() < least
    ratio = (scale / least).where(is_small, 1.0)
    shape = (-1, *[1] * (whole.dim() - 1))
    return (whole * ratio.view(shape)).round().to(torch.int8), least.where(is_small, scale)


class _InputQuantizer:
    """A hook that gives a module x̂ of x."""

    def __init__(self, grid: quantizer.Grid) -> None:
        self._grid = grid
        self._zero_point = grid.zero_point.to(torch.uint8)
        self._ends = [torch.tensor(end, dtype=torch.uint8) for end in (0, grid.levels)]

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        if not torch.onnx.is_in_onnx_export():
            return quantizer.dequantize(quantizer.quantize(x, self._grid), self._grid), *rest
        ends = (self._grid.scale, self._zero_point)
        q = _onnx("QuantizeLinear", (x, *ends), torch.uint8, x)
        if self._grid.levels < 255:  # 2 and 4 bits are types of later ONNX, 3 and 5 … 7 of none
            q = _onnx("Clip", (q, *self._ends), torch.uint8, x)
        return _onnx("DequantizeLinear", (q, *ends), torch.float32, x), *rest


def unshare_zero_points(graph: Any) -> None:
    """Give each weight of an ONNX graph a zero point of its own; exporters make one of equal ones.

    Of a shared one onnxruntime makes no uint8, as it does where int8 saturates.
    """
    import onnx_ir

    for node in graph.all_nodes():
        is_weight = node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
        if is_weight and len(node.inputs[2].uses()) > 1:  # the last user keeps it
            name, zeros = f"{node.name}_zero_point", node.inputs[2].const_value.numpy()
            own = onnx_ir.val(name, const_value=onnx_ir.tensor(zeros, name=name))
            graph.register_initializer(own)
            node.replace_input_with(2, own)


class _Weight(nn.Module):
    """s · (q − z), of int8."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale[0].clone() if (scale == scale[0]).all() else scale)
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int8))

    def forward(self, whole: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            inputs = (whole, self.scale, self.zero_point)
            return _onnx("DequantizeLinear", inputs, torch.float32, whole, axis=0)
        return whole * self.scale.view(-1, *[1] * (whole.dim() - 1))


def _onnx(
    operator: str, inputs: tuple[Any, ...], dtype: torch.dtype, like: Tensor, **attributes: Any
) -> Tensor:
    shape = like.shape
    found: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape)
    return found

"""How far two networks differ, on random inputs of several batch sizes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmlightning.errors import InputError

# Of |outputs|: float32 rounds to 6e-8 of a value, and a deep network does so hundreds of times.
TOLERANCE = 1e-5
# One may be special, and the second is that of the export; no batch is fixed then.
BATCH_SIZES = (1, 2, 5)
_SEED = 0


def draw_inputs(input_shape: Sequence[int], batch_size: int) -> Tensor:
    """Return standard normal inputs (batch_size, *input_shape), the same every time."""
    generator = torch.Generator().manual_seed(_SEED + batch_size)
    return torch.randn(batch_size, *input_shape, generator=generator)


@torch.no_grad()
def compute_outputs(
    net: Callable[[Tensor], object], input_shape: Sequence[int]
) -> dict[int, Tensor]:
    """Return the outputs of the network that is left, by batch size.

    Raises:
        InputError: it does not take such inputs, gives no tensor, or one that is not finite.
    """
    shape = ",".join(map(str, input_shape))
    outputs: dict[int, Tensor] = {}
    for size in BATCH_SIZES:
        try:
            output = net(draw_inputs(input_shape, size))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the network does not take inputs of shape {shape}: {reason}"
            ) from error
        if not isinstance(output, Tensor):
            raise InputError(
                f"the network returns a {type(output).__name__}; what can be exported returns one "
                "tensor."
            )
        if not output.isfinite().all():
            raise InputError(
                f"the network's outputs for standard normal inputs of shape {shape} are not "
                "finite: has its training diverged?"
            )
        outputs[size] = output
    return outputs


@torch.no_grad()
def largest_difference(
    net: Callable[[Tensor], Tensor], expected: dict[int, Tensor], input_shape: Sequence[int]
) -> float:
    """Return max |net(x) − y| / max |y| over all batches; infinite for other shapes or NaN.

    Args:
        net: what is compared.
        expected: y by batch size, as `compute_outputs` gives it.
        input_shape: of x, without its batch.
    """
    return max(
        _difference(net(draw_inputs(input_shape, size)), output)
        for size, output in expected.items()
    )


def _difference(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    largest = float((output.double() - expected.double()).abs().max())
    scale = float(expected.abs().max()) or 1.0
    return largest / scale if largest == largest else float("inf")

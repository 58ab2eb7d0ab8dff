"""Test that what torch does not document is as the code takes it to be."""

import pytest
import torch
from torch import Tensor

from nmlightning.parametrizations.normalize import (
    differentiate_by_kernel,
    is_captured,
    is_recorded,
    normalise_by_kernel,
    normalise_channels,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernels_are_the_formula(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(5, 3, 2, generator=draw, dtype=dtype).requires_grad_()
    columns = (torch.arange(5, dtype=dtype) + 1).view(5, 1, 1).requires_grad_()
    dw = torch.randn(5, 3, 2, generator=draw, dtype=dtype)
    exact = normalise_channels(v, columns.flatten(), 2)
    gradients = torch.autograd.grad(exact, (v, columns), dw)
    with torch.no_grad():
        w, norms = normalise_by_kernel(v, columns)
        ours = differentiate_by_kernel(dw, v, columns, norms)
    torch.testing.assert_close(w, exact)
    torch.testing.assert_close(norms.flatten(), torch.linalg.vector_norm(v, dim=(1, 2)))
    torch.testing.assert_close(ours, gradients)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
def test_what_records_and_what_does_not() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_recorded())
        return x * 1

    x = torch.ones(2)
    look(x)
    torch.func.vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)  # type: ignore[no-untyped-call]
    assert seen == [False, True, True]
    compiled = torch.compile(lambda x: x + is_recorded(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)
    assert not is_captured(x)

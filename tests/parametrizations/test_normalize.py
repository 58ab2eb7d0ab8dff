"""Test the norms, and the closed form of their derivatives against autograd of the formula."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.parametrizations.normalize import is_recorded, normalise_channels, normalise_weight
from nmlightning.weights.channel_norms import ROWS, ChannelLayout, channel_norms

Apply = Callable[..., Tensor]
NORMS = [1.0, 2.0, math.inf]
SHAPES: dict[str, tuple[tuple[int, ...], ChannelLayout, Any]] = {
    "linear": ((5, 7), ROWS, torch.contiguous_format),
    "conv": ((4, 3, 3, 3), ROWS, torch.contiguous_format),
    "channels_last": ((4, 3, 3, 3), ROWS, torch.channels_last),
    "transposed": ((4, 3, 2, 2), ChannelLayout(2), torch.contiguous_format),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ChannelLayout]:
    shape, layout, memory_format = SHAPES[name]
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return v.to(dtype).contiguous(memory_format=memory_format).requires_grad_(), layout


def make_scales(v: Tensor, layout: ChannelLayout, kind: str) -> Tensor:
    count = layout.rows(v).shape[0]
    shape = {"scalar": (), "one": (1,), "channels": (count,)}[kind]
    return (torch.arange(math.prod(shape)) + 1.5).view(shape).to(v.dtype).requires_grad_()


@pytest.fixture(params=[False, True], ids=["once", "kept"])
def apply(request: pytest.FixtureRequest) -> Apply:
    """`normalise_weight`, whose graph serves one backward pass or several."""
    return partial(normalise_weight, is_kept=request.param)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_normalised_weight_has_the_given_norms(apply: Apply, name: str, p: float) -> None:
    v, layout = make(name)
    scales = make_scales(v, layout, "channels")
    w = apply(v, scales, p, layout)
    torch.testing.assert_close(channel_norms(w, p, layout), scales.detach(), rtol=1e-14, atol=0)
    assert w.stride() == v.stride()
    rows, directions = layout.rows(w).flatten(1), layout.rows(v).flatten(1)
    cosines = torch.cosine_similarity(rows, directions)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    torch.testing.assert_close(w, normalise_channels(v, scales, p, layout), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["scalar", "one", "channels"])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_normalised_weight_passes_gradcheck(apply: Apply, name: str, p: float, kind: str) -> None:
    v, layout = make(name)
    scales = make_scales(v, layout, kind)

    def call(v: Tensor, scales: Tensor) -> Tensor:
        return apply(v, scales, p, layout)

    assert torch.autograd.gradcheck(call, (v, scales))
    assert torch.autograd.gradgradcheck(call, (v, scales))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_kept_weight_serves_several_backward_passes(name: str, p: float) -> None:
    v, layout = make(name)
    scales = make_scales(v, layout, "channels")
    w = normalise_weight(v, scales, p, layout, is_kept=True)
    for seed in range(3):
        dw = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).double()
        ours = torch.autograd.grad(w, (v, scales), dw)
        reference = torch.autograd.grad(normalise_channels(v, scales, p, layout), (v, scales), dw)
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", NORMS)
def test_norms_accumulate_in_float32(apply: Apply, dtype: torch.dtype, p: float) -> None:
    v, layout = make("conv", dtype)
    with torch.no_grad():
        v.mul_(100)
    scales = make_scales(v.float(), layout, "channels")
    w = apply(v, scales, p, layout)
    exact = normalise_channels(v.double(), scales.double(), p, layout).to(dtype)
    assert w.dtype == dtype
    bits = torch.finfo(dtype).eps
    torch.testing.assert_close(
        w, exact, rtol=0.51 * bits if dtype != torch.float32 else 4 * bits, atol=0
    )
    dw = torch.ones_like(w)
    ours = torch.autograd.grad(w, (v, scales), dw)
    v64, scales64 = (x.detach().double().requires_grad_() for x in (v, scales))
    w64 = normalise_channels(v64, scales64, p, layout)
    theirs = torch.autograd.grad(w64, (v64, scales64), dw.double())
    assert [grad.dtype for grad in ours] == [dtype, torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=4 * bits, atol=4 * bits * float(b.abs().max())
        )


@pytest.mark.parametrize("p", NORMS)
def test_large_half_weight_does_not_overflow(p: float) -> None:
    v = torch.full((2, 4000), 1000.0, dtype=torch.float16)
    w = normalise_channels(v, torch.tensor(1.0), p)
    assert ((w > 0) & w.isfinite()).all()


@pytest.mark.parametrize("p", NORMS)
def test_zero_channel_stays_zero_and_has_no_gradient(p: float) -> None:
    v, layout = make("conv")
    with torch.no_grad():
        v[1] = 0
    scales = make_scales(v, layout, "channels")
    w = normalise_channels(v, scales, p, layout)
    dv, ds = torch.autograd.grad(w, (v, scales), torch.ones_like(w))
    assert not any(x[1].any() for x in (w, dv, ds))
    assert all(x.isfinite().all() for x in (dv, ds))


@pytest.mark.parametrize("normalise", [normalise_weight, normalise_channels])
def test_max_norm_differentiates_the_first_of_several_largest(normalise: Any) -> None:
    v = torch.tensor([[1.0, -3.0, 3.0]], requires_grad=True)
    w = normalise(v, torch.tensor(3.0), math.inf, ROWS)
    (dv,) = torch.autograd.grad(w, v, torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(dv, torch.tensor([[1.0, 1 / 3, 0.0]]))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_autocast_changes_no_gradient(apply: Apply, name: str, p: float) -> None:
    v, layout = make(name, torch.float32)
    scales = make_scales(v, layout, "channels")
    dw = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    exact = torch.autograd.grad(apply(v, scales, p, layout), (v, scales), dw)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(apply(v, scales, p, layout), (v, scales), dw)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_backward_refuses_a_weight_changed_since_forward(apply: Apply) -> None:
    v, layout = make("linear")
    w = apply(v, torch.tensor(1.0, dtype=torch.float64), 2, layout)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        w.sum().backward()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_may_have_no_channel(apply: Apply, p: float, dtype: torch.dtype) -> None:
    v = torch.empty(0, 3, 2, dtype=dtype, requires_grad=True)
    w = apply(v, torch.tensor(1.0), p, ROWS)
    assert w.shape == v.shape
    (dv,) = torch.autograd.grad(w, v, torch.empty_like(w))
    assert dv.shape == v.shape


@pytest.mark.parametrize("p", NORMS)
def test_weight_may_be_larger_than_the_cpu_cache(p: float) -> None:
    v = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scales = (torch.arange(300) + 1.0).requires_grad_()
    dw = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (f(v, scales, p, ROWS) for f in (normalise_weight, normalise_channels))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(w, (v, scales), dw) for w in (ours, theirs)]
    # Of p = ∞ the largest element has the sum of a row, of up to 1e4.
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=1e-3 if p == math.inf else 1e-5)
    if weight_kernels() is not None:  # the kernels: any number of threads gives the same bits
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        again = normalise_weight(v, scales, p, ROWS)
        same = [again, *torch.autograd.grad(again, (v, scales), dw)]
        torch.set_num_threads(threads)
        torch.testing.assert_close(same, [ours, *gradients[0]], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
def test_is_recorded_under_vmap_trace_and_compile() -> None:
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(is_recorded())
        return x * 1

    x = torch.ones(2)
    note(x)
    torch.func.vmap(note)(x)
    torch.jit.trace(note, (x,), check_trace=False)
    assert seen == [False, True, True]
    compiled = torch.compile(lambda x: x + is_recorded(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nmlightning.errors import InputError
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.weights.channel_norms import (
    ROWS,
    ChannelLayout,
    channel_norms,
    effective_learning_rates,
    equilibrium_rotation,
    rotations,
    step_norms,
)
from optim_rules import channel_angles

POWERS = [1, 1.5, 2, 3, math.inf]


def norm_by_definition(row: Tensor, p: float) -> float:
    values = [abs(value) for value in row.flatten().tolist()]
    return max(values) if p == math.inf else sum(value**p for value in values) ** (1 / p)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("shape", [(5, 3), (1, 7), (4, 3, 5), (4, 2, 3, 3), (3, 2, 1, 2, 2)])
def test_channel_norms_equal_the_definition(shape: tuple[int, ...], p: float) -> None:
    weight = torch.randn(shape)
    expected = torch.tensor([norm_by_definition(row, p) for row in weight])
    torch.testing.assert_close(channel_norms(weight, p), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", POWERS)
def test_half_accumulates_in_float32(dtype: torch.dtype, p: float) -> None:
    weight = (100 * torch.randn(2, 4096)).to(dtype)  # its squares overflow half
    norms = channel_norms(weight, p)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, channel_norms(weight.double(), p).float())


def test_channel_norms_stay_float64() -> None:
    weight = nn.Parameter(torch.randn(3, 9, dtype=torch.float64))
    norms = channel_norms(weight)
    assert norms.dtype == torch.float64
    assert not norms.requires_grad
    torch.testing.assert_close(norms, weight.detach().norm(dim=1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution(dims: int, groups: int) -> None:
    """The norm of a channel is that of all weights which its output depends on."""
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = make(6, 12, 2, groups=groups, bias=False)
    layout = ChannelLayout(groups)
    norms = channel_norms(layer.weight, layout=layout)
    x = torch.randn(1, 6, *[1] * dims)
    for channel in range(12):
        (grad,) = torch.autograd.grad(layer(x)[0, channel].sum(), layer.weight)
        expected = layer.weight.detach()[grad != 0].norm()
        torch.testing.assert_close(norms[channel], expected)
    spread = layout.spread(norms, layer.weight)
    unit = channel_norms(layer.weight.detach() / spread, layout=layout)
    torch.testing.assert_close(unit, torch.ones(12))


@pytest.mark.parametrize("p", [0, 0.5, -1, math.nan])
def test_channel_norms_refuses_p_below_1(p: float) -> None:
    with pytest.raises(InputError, match=f"p must be at least 1, got {p}"):
        channel_norms(torch.ones(2, 2), p)


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 2) * 1j]
)
def test_channel_norms_refuses_other_tensors(weight: Tensor) -> None:
    with pytest.raises(InputError, match="expected a floating-point weight of two or more dim"):
        channel_norms(weight)


@pytest.mark.usefixtures("_one_process")
def test_shards_of_whole_channels() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = torch.randn(4, 3)
    for place in (Shard(0), Replicate()):
        norms = channel_norms(distribute_tensor(weight, mesh, [place]))
        assert isinstance(norms, DTensor)
        assert norms.placements == (place,)
        torch.testing.assert_close(norms.full_tensor(), channel_norms(weight))
    transposed = distribute_tensor(torch.randn(4, 3, 2), mesh, [Replicate()])
    norms = channel_norms(transposed, layout=ChannelLayout(2))
    assert norms.shape == (6,)


@pytest.mark.usefixtures("_one_process")
def test_shards_that_split_a_channel() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.randn(4, 4), mesh, [Shard(1)])
    with pytest.raises(InputError, match="channels of a weight are split over ranks"):
        channel_norms(weight)
    weight = distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])
    with pytest.raises(InputError, match="channels of a weight are split over ranks"):
        channel_norms(weight, layout=ChannelLayout(1))


def test_effective_learning_rates() -> None:
    norms = torch.tensor([1.0, 2.0, 0.5])
    sgd = effective_learning_rates(norms, 0.1, momentum=0.9)
    torch.testing.assert_close(sgd, torch.tensor([1.0, 0.25, 4.0]))
    adam = effective_learning_rates(norms, 0.1, power=1)
    torch.testing.assert_close(adam, torch.tensor([0.1, 0.05, 0.2]))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("case", ["kernels", "formula", "empty", "strided", "cast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_norms_equal_their_definition(dtype: torch.dtype, case: str) -> None:
    shapes = [(5, 3), (7 * (case != "empty"), 3000), (6, 4, 3), (4, 8, 3, 3), (70, 3)]
    kept = [torch.randn(shape).to(dtype) for shape in shapes]
    kept[3], kept[4] = kept[3].to(memory_format=torch.channels_last), kept[4].t()
    layouts = [ChannelLayout(2) if w.dim() == 3 else ROWS for w in kept]
    after, before = [w + torch.randn_like(w) for w in kept], kept
    if case == "strided":
        kept[3] = torch.zeros(4, 8, 3, 3, dtype=dtype)
    if case == "cast":
        kept[0] = kept[0].float() if dtype != torch.float32 else kept[0].double()
    kept = [torch.zeros_like(w) for w in before]
    torch.ops.nmlightning.copy_weights(kept, before)
    assert all(map(torch.equal, kept, before))
    rows = [list(map(ChannelLayout.rows, layouts, each)) for each in (after, kept)]
    assert len(torch.ops.nmlightning.step_norms(*rows)) == 3 * (case in ("kernels", "formula"))
    found = step_norms(after, kept, layouts, None if case == "formula" else weight_kernels)
    wide = [[w.double() for w in each] for each in (after, before)]
    wide.append([a - b for a, b in zip(*wide, strict=True)])
    for norms, weights in zip(found, wide, strict=True):
        for norm, weight, layout in zip(norms, weights, layouts, strict=True):
            expected = torch.linalg.vector_norm(layout.rows(weight).flatten(1), dim=1)
            # Sums of 1024 squares in float32 are good to a few 6e-8.
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 1.0, math.pi / 2, 3.0])
@pytest.mark.parametrize("growth", [1.0, 1.0001, 2.0])
def test_rotations_are_angles(angle: float, growth: float) -> None:
    before = torch.tensor([[1.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    turned = growth * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    before, after = before.float(), torch.stack([turned, 5 * turned]).float()
    norms = [channel_norms(w) for w in (before, after, after - before)]
    found = rotations(*norms)
    assert found.dtype == torch.float32
    # The squares of a step and of its part along the weight differ by their rounding, 2⁻²³ each.
    along = abs(growth - 1) + 2**-23
    torch.testing.assert_close(found, torch.full((2,), angle), rtol=1e-5, atol=along * 2**-10)
    assert rotations(torch.zeros(1), *norms[1:]).isnan().all()


@pytest.mark.parametrize(
    ("optimizer_class", "decay", "options"),
    [
        (torch.optim.SGD, 0.02, {}),
        (torch.optim.SGD, 0.02, {"momentum": 0.9}),
        (torch.optim.SGD, 0.02, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, 0.1, {"beta1": 0.9}),
    ],
    ids=["sgd", "momentum", "nesterov", "adamw"],
)
def test_equilibrium_rotation(optimizer_class: Any, decay: float, options: Any) -> None:
    """A scale-invariant weight with random gradients settles at the formula's rotation."""
    torch.manual_seed(0)
    weight = torch.randn(16, 256, dtype=torch.float64)
    settings = {"betas": (0.9, 0.99)} if optimizer_class is torch.optim.AdamW else options
    optimizer = optimizer_class([weight], 0.05, weight_decay=decay, **settings)
    squares = []
    for step in range(3000):
        norms = weight.norm(dim=1, keepdim=True)
        unit = weight / norms
        grad = torch.randn_like(weight)
        weight.grad = (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms
        before = weight.clone()
        optimizer.step()
        if step >= 2000:
            squares.append(channel_angles(before, weight).square().mean())
    found = torch.stack(squares).mean().sqrt().item()
    expected = equilibrium_rotation(0.05, decay, **options)
    assert found == pytest.approx(expected, rel=0.01)  # correlations of order 1 / 256 remain

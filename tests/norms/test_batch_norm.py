"""Batch norms against a naive definition: values, gradients, ties."""

import copy

import pytest
import torch
from torch import Tensor, nn

from batch_norm_contract import (
    EXACT,
    NORMS,
    TORCH,
    Norm,
    batch,
    define,
    every_layout,
    every_norm,
    every_statistic,
    gradients,
    learned,
)
from nmlightning import norms


@every_norm
@every_layout
def test_equals_the_definition(norm: Norm, layout: str) -> None:
    x, dims = batch(layout)
    layer = norm.layer(dims=dims, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *learned(layer)]
    expected, mean, scale = define(norm, x, layer.weight, layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves), **EXACT)
    n = x.numel() // x.shape[1]
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, **EXACT)
    start = 0.9 if norm.has_statistic else 0.9 * (1 - 1e-5)
    variance = norm.variance(scale, n)
    torch.testing.assert_close(layer.running_var, start + 0.1 * variance, **EXACT)
    assert layer.num_batches_tracked == 1


@every_norm
@pytest.mark.parametrize(
    "layout", ["1d", "1d-length", "2d", "2d-channels-last", "3d", "3d-channels-last"]
)
def test_gradcheck(norm: Norm, layout: str) -> None:
    x, dims = batch(layout)
    layer = norm.layer(dims=dims, dtype=torch.float64, track_running_stats=False)
    leaves = (x.requires_grad_(), *learned(layer))
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), leaves)


@every_statistic
def test_a_second_derivative_is_refused(norm: Norm) -> None:
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    layer = norm.layer(dims=1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="can be differentiated once, and a second"):
        torch.autograd.gradgradcheck(layer, x)
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for derive in (torch.Tensor.backward, lambda loss: torch.autograd.grad(loss, x)):
        with pytest.raises(RuntimeError, match="can be differentiated once, and a second"):
            # x is used elsewhere too, so a gradient without the penalty's share would go unnoticed.
            derive(x.sum() + grad.square().sum())


@every_norm
def test_ties(norm: Norm) -> None:
    """Whole numbers around their exact mean 0 are nearly all ties: the first of them counts."""
    half = torch.randint(-2, 3, (6, 3, 2, 4)).double()
    for x in (torch.cat([half, -half]), torch.cat([half, -half], 3)):
        for arranged in (x, x.contiguous(memory_format=torch.channels_last)):
            leaf = arranged.requires_grad_()
            layer = norm.layer(dtype=torch.float64)
            expected = define(norm, leaf, layer.weight, layer.bias)[0]
            (found,) = gradients(layer(leaf), [leaf])
            torch.testing.assert_close(found, *gradients(expected, [leaf]), **EXACT)
            # The same in bfloat16, which holds these values exactly; one rounding of the gradient.
            low = arranged.detach().bfloat16().requires_grad_()
            low_layer = copy.deepcopy(layer).float()
            grad = gradients(low_layer(low).double(), [low])[0]
            torch.testing.assert_close(grad.double(), found, rtol=2**-8, atol=2**-6)


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    """Between rows, within a row and between samples; the rest gets the mean's share alone."""
    x = torch.zeros(3, 1, 2, 4, dtype=torch.bfloat16)
    x[0, 0, 1, 2], x[0, 0, 1, 3], x[1, 0, 0, 0], x[2, 0, 0, 1] = 2.0, -2.0, -2.0, 2.0
    for arranged in (x, x.contiguous(memory_format=torch.channels_last)):
        leaf = arranged.requires_grad_()
        y = norms.LInfBatchNorm2d(1)(leaf)
        y[0, 0, 0, 0].backward()  # It has d = 0, so only the two means and the scale's pull count.
        assert leaf.grad is not None
        assert leaf.grad.flatten()[1:].unique().numel() == 1
        leaf = arranged.detach().requires_grad_()
        norms.LInfBatchNorm2d(1)(leaf)[1, 0, 0, 0].backward()
        assert leaf.grad is not None
        others = leaf.grad.flatten()[[7, 17]]
        assert leaf.grad.flatten()[6] != others[0]
        assert others[0] == others[1]


@every_layout
def test_p_2_is_batch_norm(layout: str) -> None:
    x, dims = batch(layout)
    ours = NORMS["lp2"].layer(dims=dims, dtype=torch.float64, momentum=0.3, eps=1e-3)
    theirs = TORCH[dims](3, momentum=0.3, eps=1e-3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        y, expected = ours(leaf), theirs(leaf)
        torch.testing.assert_close(y, expected, **EXACT)
        found = gradients(y, [leaf, *ours.parameters()])
        torch.testing.assert_close(
            found, gradients(expected, [leaf, *theirs.parameters()]), **EXACT
        )
        x = 2 * x + 1
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)


def test_all_values_are_the_largest() -> None:
    """Top(n) is L1, in values and gradients."""
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    top = norms.TopKBatchNorm2d(3, 12, constant="none", dtype=torch.float64)
    one = norms.L1BatchNorm2d(3, constant="none", dtype=torch.float64)
    torch.testing.assert_close(top(x), one(x), **EXACT)
    torch.testing.assert_close(gradients(top(x), [x]), gradients(one(x), [x]), **EXACT)


@every_norm
@pytest.mark.parametrize("missing", ["bias", "weight"])
def test_with_a_weight_or_a_bias_alone(norm: Norm, missing: str) -> None:
    """A swap takes over the parameters of whatever layer it finds."""
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    layer = norm.layer(dtype=torch.float64)
    setattr(layer, missing, None)
    leaves = [x, *learned(layer)]
    expected = define(norm, x, layer.weight, layer.bias)[0]
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(gradients(layer(x), leaves), gradients(expected, leaves), **EXACT)


@every_norm
def test_without_affine(norm: Norm) -> None:
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    layer = norm.layer(affine=False)
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3, affine=False).state_dict())
    expected = define(norm, x, None, None)[0]
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(gradients(layer(x), [x]), gradients(expected, [x]), **EXACT)


@every_norm
def test_saves_no_more_than_batch_norm(norm: Norm) -> None:
    def saved_bytes(layer: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            x = torch.randn(8, 64, 8, 8, requires_grad=True)
            layer(x)
        return sum(sizes.values())

    selected = norm.k or 2 * (norm.chunks or 0)
    indices = 64 * selected * (8 + 4)  # An int64 position and a float32 slope each.
    assert saved_bytes(norm.layer(64)) <= saved_bytes(nn.BatchNorm2d(64)) + indices


# Dynamo of torch 2.11 instantiates any autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "norm", [NORMS[n] for n in ("l1", "top10", "lp3.7", "range5", "mean")], ids=str
)
def test_compiles_whole(norm: Norm) -> None:
    torch._dynamo.reset()
    layer, plain = norm.layer(), norm.layer()
    plain.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (4, 6):
        x = torch.randn(size, 3, 2, 5, requires_grad=True)
        y, expected = compiled(x), plain(x)
        torch.testing.assert_close(y, expected)
        found = gradients(y, [x, *learned(layer)])
        torch.testing.assert_close(found, gradients(expected, [x, *learned(plain)]))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    torch.testing.assert_close(torch.compile(layer.eval(), backend="aot_eager")(x), plain.eval()(x))
    torch._dynamo.reset()

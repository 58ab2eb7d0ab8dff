"""Batch norms in the place of torch's: states, modes, shapes, running statistics, torch's tools."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batch_norm_contract import EXACT, TORCH, Norm, define, every_norm, gradients, learned
from nmlightning import norms
from nmlightning.errors import InputError


@every_norm
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_state_loads_into_torchs_batch_norm(norm: Norm, dims: int) -> None:
    ours, theirs = norm.layer(5, dims=dims), TORCH[dims](5)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    for _ in range(4):
        ours(3 * torch.randn(8, 5, *[3] * dims) + 1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(8, 5, *[3] * dims)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-6)
    norm.layer(5, dims=dims).load_state_dict(theirs.state_dict(), strict=True)


@every_norm
def test_update_bn_averages_all_batches_equally(norm: Norm) -> None:
    layer = norm.layer(dtype=torch.float64)
    x = torch.randn(3, 8, 3, 2, 2).double() * torch.tensor([1.0, 2, 5]).view(3, 1, 1, 1, 1)
    means, variances = [], []
    update_bn(x, layer)  # which sets momentum to None
    for part in x:
        _, mean, scale = define(norm, part, None, None)
        means.append(mean)
        variances.append(norm.variance(scale, 32))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), **EXACT)
    torch.testing.assert_close(layer.running_var, torch.stack(variances).mean(0), **EXACT)


@every_norm
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoints_count_batches_as_torchs(norm: Norm, momentum: Any, reentrant: bool) -> None:
    layer, x = norm.layer(momentum=momentum).double(), torch.randn(4, 3, 2, 5).double()
    for part in (layer, nn.BatchNorm2d(3).double()):
        block, leaf = nn.Sequential(nn.Sigmoid(), part), x.clone().requires_grad_()
        checkpoint(block, leaf, use_reentrant=reentrant).sum().backward()
        assert part.num_batches_tracked == 2


@every_norm
def test_layer_works_without_a_bias(norm: Norm) -> None:
    """As torch 2.15's layers; those of torch 2.11 have a bias with every weight."""
    layer = norm.layer(bias=False)
    keys = list(nn.BatchNorm2d(3).state_dict())
    assert list(layer.state_dict()) == [key for key in keys if key != "bias"]
    assert "bias=False" in repr(layer)
    assert repr(eval(repr(layer), vars(norms))) == repr(layer)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight.detach(), torch.ones(3))
    assert layer.eval()(torch.randn(4, 3, 2, 5)).shape == (4, 3, 2, 5)
    assert repr(norm.layer(affine=False, bias=False)) == repr(norm.layer(affine=False))


@every_norm
def test_frozen_parameters_get_no_gradient(norm: Norm) -> None:
    x = torch.randn(4, 3, 2, 5, requires_grad=True)
    layer = norm.layer().requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    layer.bias.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x.detach()).sum(), layer.bias)
    torch.testing.assert_close(grad, torch.full((3,), 40.0))


@every_norm
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_value_a_channel_is_an_error_in_training(norm: Norm, dims: int) -> None:
    x, layer = torch.randn(1, 3, *[1] * dims), norm.layer(dims=dims)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(x)
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm.layer(dims=dims, track_running_stats=False).eval()(x)
    assert norm.layer(dims=dims).eval()(x).isfinite().all()


@every_norm
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 3, 0, 4)], ids=str)
def test_empty_batch_gives_torchs_results(norm: Norm, shape: tuple[int, ...]) -> None:
    ours, theirs = norm.layer(), nn.BatchNorm2d(3)
    theirs.load_state_dict(ours.state_dict())
    theirs.weight.requires_grad_(ours.weight.requires_grad)
    x = torch.randn(shape, requires_grad=True)
    assert ours(x).shape == theirs(x).shape == shape
    found, expected = (gradients(y(x), [x, *learned(y)]) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@every_norm
def test_layer_on_meta_device_resets_to_the_new_state(norm: Norm) -> None:
    layer = getattr(norms, f"{norm.name}BatchNorm2d")(3, **norm.options, eps=0.0, device="meta")
    x = torch.randn(4, 3, 2, 5, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    empty = layer.to_empty(device="cpu")
    empty.reset_parameters()
    torch.testing.assert_close(empty.state_dict(), nn.BatchNorm2d(3).state_dict())


@every_norm
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_wrong_shapes_give_torchs_errors(norm: Norm, dims: int) -> None:
    layer = norm.layer(dims=dims)
    for wrong in (torch.randn(4), torch.randn(4, 3, *[2] * (dims + 1))):
        with pytest.raises(ValueError, match="expected") as theirs:
            TORCH[dims](3)(wrong)
        with pytest.raises(ValueError, match="expected") as ours:
            layer(wrong)
        assert str(ours.value) == str(theirs.value)
    for mode in (layer.train(), layer.eval()):
        with pytest.raises(InputError, match=r"has 3 features, got 4 channels .* shape \(5, 4,"):
            mode(torch.randn(5, 4, *[2] * dims))


@every_norm
def test_class_without_a_number_takes_any_dimensions(norm: Norm) -> None:
    """The classes without a number take what nn.SyncBatchNorm takes."""
    layer = getattr(norms, f"{norm.name}BatchNorm")(3, **norm.options)
    for shape in ((16, 3), (8, 3, 2), (4, 3, 2, 2), (2, 3, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        layer(torch.randn(3))

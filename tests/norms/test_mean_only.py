"""Mean-only batch norm: what it keeps of the scale, and what torch's norms read in its state."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nmlightning.norms import MeanOnlyBatchNorm2d


def images(**settings: Any) -> Tensor:
    return 2 * torch.randn(4, 3, 2, 5, **settings) + 1


def trained_batch_norm() -> nn.BatchNorm2d:
    """A norm of torch's whose scale is nowhere 1."""
    norm = nn.BatchNorm2d(3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=3.0)
    for _ in range(3):
        norm(5 * images())
    return norm


class TestState:
    @pytest.mark.parametrize("assign", [False, True])
    def test_load_takes_mean_and_bias_without_the_scale(self, assign: bool) -> None:
        state = trained_batch_norm().state_dict()
        given = copy.deepcopy(state)
        net = nn.Sequential(MeanOnlyBatchNorm2d(3))
        net.load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=assign)
        torch.testing.assert_close(state, given, rtol=0, atol=0)
        x, shift = images(), given["bias"] - given["running_mean"]
        torch.testing.assert_close(net.eval()(x), x + shift.view(-1, 1, 1))
        assert net[0].num_batches_tracked == 3
        assert not net[0].weight.requires_grad
        assert torch.equal(net[0].weight, torch.ones(3))
        torch.testing.assert_close(net[0].running_var, torch.full((3,), 1 - 1e-5))

    @pytest.mark.parametrize("key", ["weight", "bias", "running_mean", "running_var"])
    def test_load_rejects_a_missing_key(self, key: str) -> None:
        for source, target in ((MeanOnlyBatchNorm2d, nn.BatchNorm2d), (nn.BatchNorm2d,) * 2):
            state = source(3).state_dict()
            del state[key]
            for layer in (target(3), MeanOnlyBatchNorm2d(3)):
                with pytest.raises(RuntimeError, match=f'Missing key.* "{key}"'):
                    layer.load_state_dict(state)

    def test_reset_restores_the_new_state(self) -> None:
        layer = MeanOnlyBatchNorm2d(3)
        new = copy.deepcopy(layer.state_dict())
        layer(images())
        layer.load_state_dict({**layer.state_dict(), "bias": torch.ones(3)})
        layer.weight.fill_(5)
        layer.running_var.fill_(5)
        layer.reset_running_stats()
        torch.testing.assert_close(layer.running_var, new["running_var"], rtol=0, atol=0)
        layer.reset_parameters()
        torch.testing.assert_close(layer.state_dict(), new, rtol=0, atol=0)
        assert not layer.weight.requires_grad


def test_weight_stays_frozen_through_meta_device() -> None:
    layer = MeanOnlyBatchNorm2d(3, device="meta").to_empty(device="cpu")
    layer.load_state_dict(trained_batch_norm().state_dict())
    assert torch.equal(layer.weight, torch.ones(3))
    assert not layer.weight.requires_grad


def test_weight_set_later_has_no_effect() -> None:
    """As an initialisation by class does, which writes into `.data`, and pruning, by a hook."""
    for set_weight in (
        lambda layer: nn.init.normal_(layer.weight.data, 1.0, 0.5),
        lambda layer: prune.random_unstructured(layer, "weight", amount=2),
        lambda layer: layer.weight.requires_grad_(True),
    ):
        for mode in (True, False):
            layer, plain = MeanOnlyBatchNorm2d(4).train(mode), nn.BatchNorm2d(4).eval()
            set_weight(layer)
            layer.running_mean.normal_()
            x = images().repeat(1, 2, 1, 1)[:, :4]
            training = x - x.mean((0, 2, 3), keepdim=True)
            torch.testing.assert_close(layer.train()(x), training)
            state = layer.state_dict()
            y = layer.eval()(x)
            torch.testing.assert_close(y, x - layer.running_mean.view(-1, 1, 1))
            if "weight" in state:
                plain.load_state_dict(state)
                torch.testing.assert_close(plain(x), y)

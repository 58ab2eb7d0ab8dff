from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nmlightning
from nmlightning import InputError, probe_norms

IMAGES = 8
SIGMAS = [1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4]


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def steep(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient is no sum of what a norm takes out of it."""
    output = model(batch)
    return (output * torch.randn_like(output)).mean()


def images(sigmas: list[float] = SIGMAS) -> Tensor:
    """Return images (N, C, 16, 16) with a channel for each σ."""
    return torch.randn(IMAGES, len(sigmas), 16, 16) * torch.tensor(sigmas).view(1, -1, 1, 1)


def test_probe_norms_counts_channels_and_batches() -> None:
    (layer,) = probe_norms(nn.BatchNorm2d(8), [images(), images(), images()], steep).layers
    assert layer.lost("half_l2") == {"gradient not finite": 2 * 3, "dead": 3 * 3}
    assert layer.lost_share("half_l2") == 5 / 8
    assert layer.lost_share("l1") == 0


def test_probe_norms_measures_ranges_by_definition() -> None:
    batch = images() + 5.0
    (layer,) = probe_norms(nn.BatchNorm2d(8), [batch], steep).layers
    rows = batch.double().transpose(0, 1).flatten(1)
    deviations = rows - rows.mean(1, keepdim=True)
    scales = deviations.square().mean(1).sqrt()
    np.testing.assert_allclose(layer.scales, scales, rtol=1e-3)  # float32, at a mean of 5000 σ
    np.testing.assert_allclose(layer.deviations, deviations.abs().amax(1), rtol=1e-3)
    assert layer.offset == pytest.approx(float((rows.mean(1).abs() / scales).max()), rel=1e-3)
    assert (layer.values, layer.eps, layer.type_name) == (IMAGES * 256, 1e-5, "BatchNorm2d")


CLASSES: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "BatchNorm1d": (nn.BatchNorm1d, 1),
    "BatchNorm2d": (nn.BatchNorm2d, 2),
    "BatchNorm3d": (nn.BatchNorm3d, 3),
    "unaffine": (lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False), 2),
    "L1BatchNorm2d": (nmlightning.L1BatchNorm2d, 2),
    "LInfBatchNorm2d": (nmlightning.LInfBatchNorm2d, 2),
    "TopKBatchNorm3d": (nmlightning.TopKBatchNorm3d, 3),
    "LpBatchNorm1d": (lambda c: nmlightning.LpBatchNorm1d(c, p=2), 1),
}


@pytest.mark.parametrize("name", CLASSES)
def test_probe_norms_of_every_batch_norm(name: str) -> None:
    make, dims = CLASSES[name]
    batch = images().unflatten(2, (4, 4)) if dims == 3 else images()
    batch = batch.flatten(2) if dims == 1 else batch
    (layer,) = probe_norms(make(8), [batch.requires_grad_()], steep).layers
    assert layer.kind == "batch"
    assert layer.lost("half_l2") == {"gradient not finite": 2, "dead": 3}
    assert layer.lost("l1") == {}


@pytest.mark.parametrize("cls", [nn.LayerNorm, nmlightning.L1LayerNorm])
def test_probe_norms_counts_tokens_of_layer_norms(cls: Any) -> None:
    tokens = torch.randn(2, len(SIGMAS), 512) * torch.tensor(SIGMAS).view(1, -1, 1)
    norm = cls((2, 256))
    nn.init.uniform_(norm.weight, 0.5, 2)
    (layer,) = probe_norms(norm, [tokens.unflatten(2, (2, 256))], steep).layers
    assert (layer.kind, layer.values, len(layer.scales)) == ("layer", 512, 16)
    assert layer.lost("half_l2") == {"gradient not finite": 4, "dead": 6}
    assert layer.lost("l1") == {}
    assert set(layer.outcomes) == {"half_l2", "l1"}  # the others are not defined for tokens


def test_probe_norms_takes_gradients_before_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def note(rows: Tensor, gradients: Tensor, *_: Any) -> dict[str, Tensor]:
        seen.append(gradients)
        return {}

    monkeypatch.setattr("nmlightning.probe.probe.run_in_fp16", note)
    norm, factors = nn.LayerNorm(8), torch.randn(8)
    nn.init.uniform_(norm.weight)
    probe_norms(norm, [torch.randn(2, 3, 8)], lambda net, x: (net(x) * factors).sum())
    torch.testing.assert_close(seen, [(norm.weight * factors).detach().expand(6, 8)])


def test_probe_norms_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.BatchNorm2d(8))
    net[3].eval()
    squares(net, images()).backward()
    batches = [images(), images()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [p.grad for p in net.parameters()]
    copies = [None if g is None else g.clone() for g in gradients]
    random = torch.get_rng_state()
    probe_norms(net, batches, squares)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for parameter, gradient, copy in zip(net.parameters(), gradients, copies, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or (copy is not None and torch.equal(gradient, copy))
    assert [module.training for module in net] == [True, True, True, False]
    assert not any(module._forward_hooks for module in net.modules())


def test_probe_norms_of_a_layer_without_gradient() -> None:
    net = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1))
    (layer,) = probe_norms(net, [images()], squares).layers
    assert layer.lost("half_l2") == {"dead": 3}


def test_probe_norms_of_a_shared_layer() -> None:
    norm = nn.BatchNorm2d(8)
    (layer,) = probe_norms(nn.Sequential(norm, nn.ReLU(), norm), [images()], steep).layers
    assert (layer.name, len(layer.scales)) == ("0", 16)
    assert layer.lost("half_l2") == {"gradient not finite": 2, "dead": 3}


def test_probe_norms_names_unmeasured_layers() -> None:
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False)

    others = [nmlightning.MeanOnlyBatchNorm2d(8), nn.GroupNorm(2, 8), Frozen(8)]
    ranges = probe_norms(nn.Sequential(nn.BatchNorm2d(8), *others), [images()], squares)
    assert [layer.name for layer in ranges.layers] == ["0"]
    assert ranges.left_out == {
        "1": "MeanOnlyBatchNorm2d has no scale",
        "2": "GroupNorm is neither a batch norm nor a layer norm",
        "3": "Frozen saw no batch in training mode",
    }


def test_probe_norms_counts_nan_inputs_as_input_losses() -> None:
    batch = images([1.0] * 8)
    batch[0, 3] = float("nan")
    (layer,) = probe_norms(nn.BatchNorm2d(8), [batch], squares).layers
    assert layer.input_share() == 1 / 8
    assert layer.count("l1", "input") == layer.count("half_l2", "input") == 1
    assert len(layer.finite_scales) == 7


@pytest.mark.parametrize(
    ("net", "batches", "message"),
    [
        (nn.Conv2d(8, 4, 1), 1, "There is no batch or layer norm to measure in Conv2d."),
        (nn.GroupNorm(2, 8), 1, "measure in GroupNorm: GroupNorm is neither a batch norm nor a"),
        (nn.BatchNorm2d(8), 0, "No batch was run: the data are empty."),
    ],
)
def test_probe_norms_refuses_bad_input(net: nn.Module, batches: int, message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        probe_norms(net, [images()] * batches, squares)

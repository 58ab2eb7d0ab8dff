"""Test what happens between optimizer steps: one computation, and at each step a projection."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from nmlightning import InputError, apply_weight_norm, channel_norms, remove_weight_norm
from nmlightning.parametrizations.normalize import NormalisedWeights


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was computed for training, since it was cleared."""
    calls: list[Any] = []
    original = NormalisedWeights.apply

    def count(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(NormalisedWeights, "apply", count)
    return calls


def step(net: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, batches: int) -> None:
    optimizer.zero_grad()
    for _ in range(batches):
        net(images).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "form", [{"kind": "bounded"}, {"kind": "weight"}, {"kind": "bounded", "gain": "channel"}]
)
def test_a_cached_weight_changes_nothing(
    net: nn.Sequential, images: Tensor, form: dict[str, Any]
) -> None:
    twin = copy.deepcopy(net)
    apply_weight_norm(net, **form)
    apply_weight_norm(twin, cache=False, **form)
    optimizers = [torch.optim.SGD(x.parameters(), 0.1, momentum=0.9) for x in (net, twin)]
    for _ in range(5):
        step(net, images, optimizers[0], 3)
        step(twin, images, optimizers[1], 3)
        assert torch.equal(net(images), twin(images))


def test_it_is_computed_once_a_step(
    net: nn.Sequential, images: Tensor, computed: list[Any]
) -> None:
    apply_weight_norm(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step(net, images, optimizer, 1)
    for _ in range(2):
        computed.clear()
        step(net, images, optimizer, 4)
        assert len(computed) == 1  # for all convolutions together


class DataOptimizer(torch.optim.Optimizer):
    """Moves parameters as torch does not see: through `.data`."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for q in self.param_groups[0]["params"]:
            q.data.sub_(q.grad.data)


def change_with_no_grad(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].parametrizations.weight.original.add_(1)  # type: ignore[union-attr]


def change_gain(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].parametrizations.weight[0].gain.mul_(2)  # type: ignore[index, union-attr]


def change_by_loading(net: nn.Sequential) -> None:
    state = net.state_dict()
    net.load_state_dict({k: v if k.endswith("order") else v + 1 for k, v in state.items()})


def change_by_an_optimizer(net: nn.Sequential) -> None:
    DataOptimizer(net.parameters()).step()


def change_in_evaluation(net: nn.Sequential) -> None:
    net.eval()
    net[0].parametrizations.weight.original.data.add_(1)  # type: ignore[union-attr]
    net.train()


def change_by_training_what_was_frozen(net: nn.Sequential) -> None:
    hidden = net[0].parametrizations.weight.original  # type: ignore[union-attr]
    hidden.requires_grad_(False)
    net.train()  # forgets what was computed with its gradient
    assert net[0].weight.requires_grad  # type: ignore[union-attr]  # its gains are trained
    hidden.requires_grad_(True)
    net.zero_grad()
    net[0].weight.square().sum().backward()  # type: ignore[operator, union-attr]
    assert hidden.grad is not None  # type: ignore[union-attr]
    with torch.no_grad():
        hidden.add_(1)  # type: ignore[operator]


def change_dtype(net: nn.Sequential) -> None:
    net.to(torch.float64)


def exchange_data(net: nn.Sequential) -> None:
    hidden = net[0].parametrizations.weight.original  # type: ignore[union-attr]
    for _ in range(3):  # the first of these would otherwise be free for the last
        hidden.data = hidden.data.clone() + 1  # type: ignore[operator, union-attr]


def make_zero(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].parametrizations.weight.original[0] = 0  # type: ignore[index, union-attr]
    assert not net[0].weight[0].any()  # type: ignore[index]


def change_rho(net: nn.Sequential) -> None:
    net[0].parametrizations.weight[0].rho.mul_(2)  # type: ignore[index, union-attr]


def test_what_is_computed_is_no_place_to_change_it(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net)
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    computed = net[0].weight
    before = computed.detach().clone()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        computed.mul_(2)  # type: ignore[operator]
    assert torch.equal(net[0].weight, before)  # type: ignore[arg-type]


def test_rho_may_be_changed(net: nn.Sequential, images: Tensor) -> None:
    rho = apply_weight_norm(net).weights["0.weight"]
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    net(images)
    change_rho(net)
    norms = channel_norms(net[0].weight)  # type: ignore[arg-type]
    torch.testing.assert_close(norms, torch.full_like(norms, 2 * rho))


@pytest.mark.parametrize(
    "change",
    [
        change_with_no_grad,
        change_gain,
        change_by_loading,
        change_by_an_optimizer,
        change_in_evaluation,
        change_by_training_what_was_frozen,
        change_dtype,
        exchange_data,
        make_zero,
    ],
)
def test_a_change_is_seen(net: nn.Sequential, images: Tensor, change: Any) -> None:
    apply_weight_norm(net, "weight")
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    net(images).square().mean().backward()
    before = net[0].weight
    assert net[0].weight is before
    change(net)
    assert not torch.equal(net[0].weight.double(), before.double()) or change is change_dtype  # type: ignore[operator, union-attr]
    fresh = copy.deepcopy(net)
    assert torch.equal(net[0].weight, fresh[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change",
    [
        change_with_no_grad,
        change_gain,
        change_by_loading,
        change_in_evaluation,
        change_dtype,
        exchange_data,
        change_rho,
    ],
)
def test_a_change_is_seen_in_evaluation(net: nn.Sequential, change: Any, mode: Any) -> None:
    """Where w is kept, so that a text is written with what was computed once."""
    apply_weight_norm(net, "weight" if change is not change_rho else "bounded")
    net.eval()
    with mode():
        before = net[0].weight
        assert net[0].weight is before
    change(net)
    net.eval() if change is change_in_evaluation else None
    with mode():
        now = net[0].weight
    assert not torch.equal(now.double(), before.double()) or change is change_dtype  # type: ignore[operator, union-attr]
    assert torch.equal(now, copy.deepcopy(net)[0].weight)  # type: ignore[arg-type]


def test_what_is_kept_in_evaluation_is_not_for_training(net: nn.Sequential) -> None:
    apply_weight_norm(net)
    with torch.no_grad():
        kept = net.eval()[0].weight
    assert not kept.requires_grad  # type: ignore[union-attr]
    assert net[0].weight.requires_grad  # type: ignore[union-attr]  # in evaluation, with gradients
    for module in net.modules():
        module.training = True  # which forgets nothing, as train() does
    net[0].parametrizations.weight[0].hidden.is_stepped = True  # type: ignore[index, union-attr]
    assert net[0].weight.requires_grad  # type: ignore[union-attr]


def test_without_cache_nothing_is_kept_in_evaluation(net: nn.Sequential) -> None:
    apply_weight_norm(net, cache=False)
    with torch.no_grad():
        assert net.eval()[0].weight is not net[0].weight


def test_evaluation_computes_no_graph(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net)
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    with torch.no_grad():
        assert not net(images).requires_grad
    with torch.inference_mode():
        net(images)
    net.zero_grad()
    net(images).sum().backward()
    assert net[0].parametrizations.weight.original.grad is not None  # type: ignore[union-attr]


def test_before_an_optimizer_moved_it_nothing_is_kept(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net)
    net(images).square().mean().backward()
    before = net[0].weight.detach().clone()  # type: ignore[operator, union-attr]
    for q in net.parameters():
        assert q.grad is not None
        q.data -= 0.1 * q.grad
    assert not torch.equal(net[0].weight, before)  # type: ignore[arg-type]


def test_what_is_frozen_gets_no_gradient_from_the_others(
    net: nn.Sequential, images: Tensor
) -> None:
    apply_weight_norm(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step(net, images, optimizer, 1)
    optimizer.zero_grad()
    net[0].requires_grad_(False)
    assert not net[0].weight.requires_grad  # type: ignore[union-attr]
    net(images).sum().backward()
    hidden = [net[i].parametrizations.weight.original for i in (0, 2)]  # type: ignore[union-attr]
    assert [v.grad is None for v in hidden] == [True, False]  # type: ignore[union-attr]


def test_each_part_may_have_its_own_backward_pass(net: nn.Sequential) -> None:
    twin = copy.deepcopy(net)
    apply_weight_norm(net, "weight", gain="channel")
    apply_weight_norm(twin, "weight", gain="channel", cache=False)
    for x in (net, twin):
        optimizer = torch.optim.SGD(x.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            x[0].weight.square().sum().backward()  # type: ignore[operator, union-attr]
            x[2].weight.exp().sum().backward()  # type: ignore[operator, union-attr]
            x[0].weight.exp().sum().backward()  # type: ignore[operator, union-attr]
            optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointed_activations(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, "weight")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step(net, images, optimizer, 1)
    grads = []
    for reentrant in (None, False, True):
        optimizer.zero_grad()
        x = images.clone().requires_grad_()
        for part in (net[:2], net[2:]):
            x = part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)  # type: ignore[no-untyped-call]
        x.square().mean().backward()
        grads.append([q.grad for q in net.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_a_part_of_a_model_is_copied_alone(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, project=True)
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    part = copy.deepcopy(net[0])
    optimizer = torch.optim.SGD(part.parameters(), 0.1)
    for _ in range(2):
        step(part, images, optimizer, 1)
    assert torch.equal(part.weight, copy.deepcopy(part).weight)


def test_functional_transforms(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, "weight")
    step(net, images, torch.optim.SGD(net.parameters(), 0.1), 1)
    parameters = dict(net.named_parameters())

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, image[None]).square().mean()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    net.zero_grad()
    (net(images).square().mean(1).mean()).backward()
    for name, q in parameters.items():
        torch.testing.assert_close(per_image[name].mean(0), q.grad)


@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("made", ["before", "after"])
def test_projection_keeps_the_hidden_norm(
    net: nn.Sequential, images: Tensor, p: float, made: str
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) if made == "before" else None
    rho = apply_weight_norm(net, p=p, project=True).weights["0.weight"]
    optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(5):
        step(net, images, optimizer, 1)
        hidden = net[0].parametrizations.weight.original  # type: ignore[union-attr]
        torch.testing.assert_close(
            channel_norms(hidden, p),
            torch.full((8,), rho),
            rtol=1e-6,
            atol=0,  # type: ignore[arg-type]
        )


def test_without_it_the_hidden_norm_grows(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net)
    hidden = net[0].parametrizations.weight.original  # type: ignore[union-attr]
    before = channel_norms(hidden)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), 10.0)
    for _ in range(5):
        step(net, images, optimizer, 1)
    assert (channel_norms(hidden) > before).all()  # type: ignore[arg-type]


def test_projection_changes_no_output(net: nn.Sequential, images: Tensor) -> None:
    twin = copy.deepcopy(net)
    apply_weight_norm(net, project=True)
    apply_weight_norm(twin)
    torch.testing.assert_close(net(images), twin(images))
    for x in (net, twin):
        step(x, images, torch.optim.SGD(x.parameters(), 0.0), 1)
    torch.testing.assert_close(net(images), twin(images))


def test_only_a_step_of_its_own_optimizer_projects(net: nn.Sequential, images: Tensor) -> None:
    apply_weight_norm(net, project=True)
    hidden = net[0].parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        hidden.mul_(3)  # type: ignore[operator]
    before = channel_norms(hidden)  # type: ignore[arg-type]
    step(net, images, torch.optim.SGD(net[5].parameters(), 0.1), 1)
    assert torch.equal(channel_norms(hidden), before)  # type: ignore[arg-type]


def test_a_copy_is_projected_too_and_a_removed_one_is_not(
    net: nn.Sequential, images: Tensor
) -> None:
    rho = apply_weight_norm(net, project=True).weights["0.weight"]
    copied = copy.deepcopy(net)
    step(copied, images, torch.optim.SGD(copied.parameters(), 0.5), 1)
    norms = channel_norms(copied[0].parametrizations.weight.original)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(norms, torch.full((8,), rho))
    remove_weight_norm(net)
    step(net, images, torch.optim.SGD(net.parameters(), 0.5), 1)
    assert (channel_norms(net[0].weight) - rho).abs().max() > 1e-4  # type: ignore[arg-type]


class Prunes(torch.optim.SGD):
    """Makes a channel zero in its step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][1] = 0


@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("form", [{}, {"gain": "channel"}, {"kind": "weight"}])
def test_a_step_may_make_a_channel_zero(
    net: nn.Sequential, images: Tensor, p: float, form: dict[str, Any]
) -> None:
    apply_weight_norm(net, p=p, **form)
    optimizer = Prunes([net[0].parametrizations.weight.original, *net[2].parameters()], 0.1)  # type: ignore[list-item, union-attr]
    for _ in range(3):
        step(net, images, optimizer, 2)
        assert not net[0].weight[1].any()  # type: ignore[index]
        assert net(images).isfinite().all()
        assert all(q.grad is None or q.grad.isfinite().all() for q in net.parameters())


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_what_is_too_small_for_its_square_is_zero(net: nn.Sequential, size: float) -> None:
    apply_weight_norm(net)
    net[0].parametrizations.weight.original.data[1] = size  # type: ignore[index, union-attr]
    with torch.no_grad():
        assert not net.eval()[0].weight[1].any()  # type: ignore[index]
    assert not net.train()[0].weight[1].any()  # type: ignore[index]


def test_gains_of_zero(net: nn.Sequential) -> None:
    apply_weight_norm(net, gain="channel")
    with torch.no_grad():
        net[0].parametrizations.weight[0].gain.zero_()  # type: ignore[index, union-attr]
    assert not net[0].weight.any()  # type: ignore[operator, union-attr]


def test_shards_of_a_transposed_convolution_cannot_be_projected(images: Tensor) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    apply_weight_norm(net, project=True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, foreach=False)
        with pytest.raises(InputError, match="are split over ranks"):
            step(net, images, optimizer, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_is_projected_after_its_first_place_is_replaced() -> None:
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(3, 4)})
    net["second"].weight = net["first"].weight
    rho = apply_weight_norm(net, project=True, include=["*.weight"]).weights["first.weight"]
    copied = copy.deepcopy(net)
    copied["first"] = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(copied.parameters(), 0.5)
    copied["second"](torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    norms = channel_norms(copied["second"].parametrizations.weight.original)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(norms, torch.full((4,), rho))


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_copy_of_one_place_of_a_tied_weight_is_projected(place: str) -> None:
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(3, 4)})
    net["second"].weight = net["first"].weight
    rho = apply_weight_norm(net, project=True, include=["*.weight"]).weights["first.weight"]
    copied = copy.deepcopy(net[place])
    optimizer = torch.optim.SGD(copied.parameters(), 0.5)
    copied(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    norms = channel_norms(copied.parametrizations.weight.original)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(norms, torch.full((4,), rho))

"""The contract of every rule: scope, patterns, removal, resuming, clear refusals."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import nmlightning
from nmlightning.errors import InputError
from nmlightning.weights.channel_norms import ChannelLayout, channel_norms
from nmlightning.weights.history import NormHistory
from optim_rules import (
    ANY_MATRIX,
    REFERENCED,
    SCALE_INVARIANT,
    MakeRule,
    attach,
    make_net,
    random_history,
    sgd,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:LRCorrection.mode=.paper.. lets weights")


@pytest.mark.parametrize("rule_name", SCALE_INVARIANT)
def test_rule_moves_only_convolutions(make_rule: MakeRule) -> None:
    net, optimizer, handle = attach(make_rule)
    plain = make_net()
    assert [weight.name for weight in handle.weights] == ["conv1.weight", "conv2.weight"]
    train(net, optimizer, 1)
    train(plain, sgd(plain), 1)
    for name, parameter in net.named_parameters():
        same = torch.equal(parameter, plain.get_parameter(name))
        assert same is not name.startswith("conv"), name


@pytest.mark.parametrize("rule_name", ANY_MATRIX)
def test_rule_steers_any_matrix(make_rule: MakeRule) -> None:
    """Also where the loss feels its norm, without a warning; vectors are left."""
    net, optimizer, handle = attach(make_rule, net_of_two_kinds())
    names = ["conv1.weight", "conv2.weight", "head.weight"]
    sorts = handle._rule.sorts  # it measures, and steers all the same
    assert handle.reasons() == dict.fromkeys(names, "steered" + "; no gradient yet" * sorts)
    assert handle.measured is not sorts
    train(net, optimizer, 1)
    assert list(handle.factors()) == names
    assert handle.steered == names
    handle.remove()
    named = make_rule(None, include=["head.weight"]).attach(optimizer, net.named_parameters())
    assert list(named.reasons()) == ["head.weight"]
    with pytest.raises(InputError, match=r"expected a .*two or more dim"):
        make_rule(None, include=["head.bias"]).attach(optimizer, net.named_parameters())


@pytest.mark.parametrize("interrupted_after", [1, 13])
def test_resume_is_bit_for_bit(make_rule: MakeRule, interrupted_after: int) -> None:
    history = random_history(make_net())

    def start() -> tuple[nn.Module, list[Any]]:
        net = make_net()
        optimizer = sgd(net)
        handle = make_rule(history).attach(optimizer, net.named_parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return net, [net, optimizer, scheduler, handle]

    whole, (_, optimizer, scheduler, _) = start()
    train(whole, optimizer, 25, each=lambda _: scheduler.step())

    first, stateful = start()
    train(first, stateful[1], interrupted_after, each=lambda _: stateful[2].step())
    state = [each.state_dict() for each in stateful]
    file = io.BytesIO()
    torch.save(state, file)
    train(first, stateful[1], 3, first=interrupted_after)  # what is kept must not change any more

    second, (_, optimizer, scheduler, handle) = start()
    file.seek(0)
    for each, kept in zip(
        [second, optimizer, scheduler, handle], torch.load(file, weights_only=True), strict=True
    ):
        each.load_state_dict(kept)
    assert handle.steps == interrupted_after
    rest = 25 - interrupted_after
    train(second, optimizer, rest, first=interrupted_after, each=lambda _: scheduler.step())
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_state_of_other_weights_is_refused(make_rule: MakeRule) -> None:
    one, other = attach(make_rule)[2], attach(make_rule, exclude=["conv2*"])[2]
    with pytest.raises(InputError, match=r"is for other weights; conv2.weight differs"):
        other.load_state_dict(one.state_dict())


def net_of_two_kinds() -> nn.Module:
    """Return the net without its second norm, so that the loss feels the norm of conv2."""
    net = make_net()
    net.norm2 = nn.Identity()
    return net


@pytest.mark.parametrize("rule_name", SCALE_INVARIANT)
@pytest.mark.parametrize("included", [False, True], ids=["dropped", "included"])
def test_scale_variant_weight_is_dropped_unless_named(make_rule: MakeRule, included: bool) -> None:
    include = ["conv2*"] if included else []
    net, optimizer, handle = attach(make_rule, net_of_two_kinds(), include=include)
    if included:
        with pytest.warns(UserWarning, match="conv2.weight is steered, but the loss depends on"):
            train(net, optimizer, 1)
    else:
        train(net, optimizer, 1)
    plain = net_of_two_kinds()
    train(plain, sgd(plain), 1)
    assert ("conv2.weight" in handle.steered) is included
    assert torch.equal(net.conv2.weight, plain.conv2.weight) is not included
    assert torch.equal(net.conv1.weight, plain.conv1.weight) is included


def test_patterns_choose_weights(make_rule: MakeRule, rule_name: str) -> None:
    def steered(**patterns: list[str]) -> list[str]:
        return [weight.name for weight in attach(make_rule, **patterns)[2].weights]

    left = ["conv2.weight", "head.weight"] if rule_name in ANY_MATRIX else ["conv2.weight"]
    assert steered(exclude=["conv1.*"]) == left
    assert steered(include=["conv1.weight"]) == ["conv1.weight"]
    with pytest.raises(InputError, match=r"'covn1\*' matches no parameter. There is conv1.we"):
        steered(exclude=["covn1*"])
    with pytest.raises(InputError, match="There is no weight to steer"):
        steered(exclude=["conv*", "head*"])


def split_by_hand(net: nn.Module) -> list[dict[str, Any]]:
    """As Hugging Face's Trainer and most projects do, with options of their own."""
    weights, rest = ([q for q in net.parameters() if (q.dim() > 1) is x] for x in (True, False))
    return [{"params": weights, "weight_decay": 0.05, "lr": 0.2}, {"params": rest, "lr": 0.3}]


GROUPS: dict[str, Callable[[nn.Module], Any]] = {
    "timm": lambda net: timm.optim.param_groups_weight_decay(net, 0.05),
    "timm, by layer": lambda net: timm.optim.param_groups_layer_decay(net, 0.05),
    "by hand": split_by_hand,
    "plain": lambda net: net.parameters(),
    "named": lambda net: net.named_parameters(),
    "named, of an optimizer": lambda net: torch.optim.SGD(net.named_parameters(), 0.1).param_groups,
    "one tensor": lambda net: [{"params": q, "weight_decay": 0.01} for q in net.parameters()],
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("rule_name", ["stable", "decay", "hyperball"])
def test_weight_decay_inside_the_step_is_refused_with_a_way_out(
    make_rule: MakeRule, kind: str
) -> None:
    net = make_net()
    rule = make_rule(random_history(net), exclude=["conv2.*"])
    with pytest.raises(
        InputError, match=r"conv1.weight has weight decay 0.0\d+ in .* config `weight_decay: 0` of"
    ) as raised:
        rule.attach(sgd(net, weight_decay=0.01), net)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    before = {q: group for group in make(GROUPS[kind](net)).param_groups for q in group["params"]}
    names = {"groups": GROUPS[kind](net), "model": net, "rule": rule, "nmlightning": nmlightning}
    optimizer = make(eval(str(raised.value).split("`")[1], names))
    rule.attach(optimizer, net).remove()
    after = {q: group for group in optimizer.param_groups for q in group["params"]}
    steered = {net.conv1.weight} | ({net.head.weight} if rule.least_dims == 2 else set())
    assert before.keys() == after.keys()
    for q, group in after.items():
        assert group["lr"] == before[q]["lr"]
        assert group["weight_decay"] == (0 if q in steered else before[q]["weight_decay"])


@pytest.mark.parametrize("rule_name", ["schedule", "decay", "hyperball"])
def test_optimizer_without_a_learning_rate_is_refused(make_rule: MakeRule) -> None:
    """pytorch_optimizer's A2Grad has none."""
    net = make_net()
    optimizer = sgd(net)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(InputError, match='SGD has no "lr" in its parameter groups'):
        make_rule(random_history(net)).attach(optimizer, net)


def test_flat_shard_of_fsdp1_is_refused(make_rule: MakeRule) -> None:
    net = make_net()
    net.head.weight._is_flat_param = True
    with pytest.raises(InputError, match=r"head.weight is a flat shard of FSDP1, which has no ch"):
        attach(make_rule, net)


def test_compiled_and_parametrized_modules_keep_their_names(make_rule: MakeRule) -> None:
    net = make_net()
    history = random_history(net)
    torch.nn.utils.parametrizations.weight_norm(net.conv2)
    compiled = torch.compile(net, backend="eager")
    handle = make_rule(history, include=["conv*.weight"], exclude=["conv2.weight"]).attach(
        sgd(net), compiled.named_parameters()
    )
    assert [weight.name for weight in handle.weights] == ["conv1.weight"]


@pytest.mark.usefixtures("_one_process")
def test_sharded_weights_are_steered_as_plain_ones(make_rule: MakeRule) -> None:
    """These are DTensors, sharded by their channels."""
    plain = make_net()
    history = random_history(plain)
    weights = {name: q.detach().clone() for name, q in plain.named_parameters()}
    mesh = init_device_mesh("cpu", (1,))
    sharded = {
        name: nn.Parameter(distribute_tensor(weights[name], mesh, [Shard(0)]))
        for name in ("conv1.weight", "conv2.weight")
    }
    optimizer = torch.optim.SGD(sharded.values(), lr=0.02, momentum=0.9, foreach=False)
    make_rule(history).attach(optimizer, sharded.items())
    own = torch.optim.SGD([plain.conv1.weight, plain.conv2.weight], lr=0.02, momentum=0.9)
    make_rule(history).attach(own, plain.named_parameters())

    def copy_gradients(step: int) -> None:
        for name, q in sharded.items():
            grad = plain.get_parameter(name).grad
            q.grad = distribute_tensor(grad, mesh, [Shard(0)])
        optimizer.step()

    train(plain, own, 4, each=copy_gradients)
    for name, q in sharded.items():
        torch.testing.assert_close(q.full_tensor(), plain.get_parameter(name))


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_channels_of_transposed_convolutions_lie_across_the_weight(make_rule: MakeRule) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    layout = ChannelLayout(2)
    norms = channel_norms(layer.weight, layout=layout).float()
    history = NormHistory.from_arrays({"weight": norms[None].numpy() * 0.5}, [10], [0])
    net = nn.Sequential(layer, nn.BatchNorm2d(6, eps=1e-30).double())
    named: list[tuple[str, Tensor]] = [("weight", layer.weight)]
    optimizer = torch.optim.SGD([layer.weight], lr=0.01)
    handle = make_rule(history).attach(optimizer, named, {"weight": layout})
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    target = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    (net(x) * target).sum().backward()
    optimizer.step()
    assert handle.scope.shares["weight"] < 1e-10


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_recording_that_does_not_fit_is_refused(make_rule: MakeRule) -> None:
    net = make_net()
    history = random_history(net)
    with pytest.raises(InputError, match="no recording of weight norms at nowhere"):
        make_rule("nowhere").attach(sgd(net), net.named_parameters())
    with pytest.raises(InputError, match="The recording is empty"):
        make_rule(history.until(0)).attach(sgd(net), net.named_parameters())
    optimizer = sgd(net)
    make_rule(history.until(10)).attach(optimizer, net.named_parameters())
    with pytest.raises(InputError, match=r"does not reach step 1[01]"):
        train(net, optimizer, 12)


@pytest.mark.parametrize("rule_name", REFERENCED)
def test_unknown_optimizer_needs_a_power(make_rule: MakeRule) -> None:
    net = make_net()
    history = random_history(net)
    optimizer = torch.optim.Adagrad(net.parameters())
    with pytest.raises(InputError, match="The power for Adagrad is not known: give power=2 if"):
        make_rule(history).attach(optimizer, net.named_parameters())
    make_rule(history, power=1).attach(optimizer, net.named_parameters())
    with pytest.raises(InputError, match="power is 'auto', 1 or 2, got 3"):
        make_rule(history, power=3).attach(optimizer, net.named_parameters())

"""guard_norms and its callback: statistics where a step is skipped or a batch is not finite."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nmlightning import guard_norms
from nmlightning.callbacks import NormGuard
from nmlightning.errors import InputError
from nmlightning.norms import L1BatchNorm1d
from optim_rules import IMPLEMENTATIONS
from trainers import quiet_trainer

OVERFLOWS = (0, 3, 4)
NORMS = {
    "batch": lambda: nn.BatchNorm1d(3),
    "average": lambda: nn.BatchNorm1d(3, momentum=None),
    "plain": lambda: nn.BatchNorm1d(3, affine=False),
    "ours": lambda: L1BatchNorm1d(3),
}


def make_net(kind: str = "batch") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), NORMS[kind](), nn.Linear(3, 1))


def draw(step: int) -> Tensor:
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(step))


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def train(net: nn.Module, *, guarded: bool, parts: int = 1, **options: Any) -> None:
    """Skip the steps of OVERFLOWS by a scaler, or leave their batches out."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, **options)
    # Which lowers its scale by nothing, so that all gradients round alike.
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, backoff_factor=1 - 1e-10)
    guard = guard_norms(net, scaler) if guarded else None
    for step in range(6):
        if not guarded and step in OVERFLOWS:
            continue
        optimizer.zero_grad()
        for part in range(parts):
            scaler.scale(net(draw(parts * step + part)).square().mean()).backward()
        if step in OVERFLOWS:
            net[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    if guard is not None:
        guard.remove()
        assert "step" not in vars(scaler)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipped_step_costs_the_batch_and_nothing_else(
    kind: str, parts: int, implementation: str
) -> None:
    nets = make_net(kind), make_net(kind)
    for net, guarded in zip(nets, (True, False), strict=True):
        train(net, guarded=guarded, parts=parts, **IMPLEMENTATIONS[implementation])
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    assert int(nets[0][1].num_batches_tracked) == 3 * parts


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["batch", "average", "plain"])
def test_batch_that_is_not_finite_leaves_the_statistics(kind: str, value: float) -> None:
    """Also without a scaler, and within accumulation, whose other batches count."""
    net, other = make_net(kind), make_net(kind)
    guard = guard_norms(net)
    for step in range(4):
        x = draw(step)
        if step == 2:
            x[1, 0] = value
        else:
            other(x)
        net(x)
    torch.testing.assert_close(statistics(net), statistics(other), rtol=0, atol=0)
    guard.remove()
    net(torch.full((4, 2), value))
    assert not all(bool(x.isfinite().all()) for x in statistics(net).values())


def test_evaluation_and_update_bn_are_left_alone() -> None:
    net, other = make_net("average"), make_net("average")
    scaler = torch.amp.GradScaler("cpu")
    guard_norms(net, scaler)
    for each in (net, other):
        each.eval()(torch.full((4, 2), torch.inf))
        torch.optim.swa_utils.update_bn([draw(0), draw(1)], each)
    torch.testing.assert_close(statistics(net), statistics(other), rtol=0, atol=0)


def test_optimizer_restores_its_own_norms() -> None:
    """Two networks with a scaler for both, as in a GAN: one's overflow is not the other's."""
    scaler = torch.amp.GradScaler("cpu")
    nets = make_net(), make_net()
    model = nn.ModuleList(nets)
    guard_norms(model, scaler)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in nets]
    before = [statistics(net) for net in nets]
    for net in nets:
        scaler.scale(net(draw(0)).mean()).backward()
    nets[0][0].weight.grad[0, 0] = torch.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(statistics(nets[0]), before[0], rtol=0, atol=0)
    assert int(nets[1][1].num_batches_tracked) == 1


def test_compiled_model_is_guarded() -> None:
    net = make_net()
    guard_norms(net)
    compiled = torch.compile(net, backend="eager")
    compiled(draw(0))
    known = statistics(net)
    compiled(torch.full((6, 2), torch.nan))
    torch.testing.assert_close(statistics(net), known, rtol=0, atol=0)
    assert int(net[1].num_batches_tracked) == 1


def test_model_without_running_statistics_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential has no norm with running statistics to guard"):
        guard_norms(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    norm, sgd = nn.BatchNorm1d(3), torch.optim.SGD([torch.zeros(1)])
    for given in ((sgd, None), (norm, "x"), (norm, sgd)):
        with pytest.raises(InputError, match=r"(a model|GradScaler, or None), got (str|SGD)\."):
            guard_norms(*given)  # type: ignore[arg-type]


class Overflows(pl.LightningModule):
    def __init__(self, *, leaves_out: bool) -> None:
        super().__init__()
        self.net, self.leaves_out, self.step_number = make_net(), leaves_out, -1

    def training_step(self, batch: Tensor, _: int) -> Tensor | None:
        self.step_number += 1
        skips = self.leaves_out and self.step_number in OVERFLOWS
        return None if skips else self.net(batch).square().mean()

    def on_after_backward(self) -> None:
        if self.step_number in OVERFLOWS:
            self.net[0].weight.grad[0, 0] = torch.inf

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_callback_ends_with_a_fit_that_fails(tmp_path: Path) -> None:
    module = Overflows(leaves_out=False)
    data = DataLoader(torch.randn(6, 5), batch_size=6)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quiet_trainer(NormGuard(), default_root_dir=tmp_path).fit(module, data)
    assert not module.net[1]._forward_hooks


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_callback_in_16_mixed(tmp_path: Path) -> None:
    modules = []
    for leaves_out in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, backoff_factor=1 - 1e-10)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        module = Overflows(leaves_out=leaves_out)
        options = {"max_epochs": 1, "default_root_dir": tmp_path, "plugins": precision}
        data = DataLoader(torch.cat([draw(step) for step in range(6)]), batch_size=6)  # type: ignore[arg-type]
        quiet_trainer(NormGuard(), **options).fit(module, data)
        assert "step" not in vars(scaler)
        modules.append(module)
    one, other = (module.state_dict() for module in modules)
    torch.testing.assert_close(one, other, rtol=0, atol=0)

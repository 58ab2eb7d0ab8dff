"""Test NormSwap on LightningModules of both Lightning packages, which know nothing of it."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightning_modules import (
    BOTH,
    OwnOptimizer,
    PlLate,
    PlModule,
    fit,
    make,
    make_data,
    make_trainer,
    norm_types,
    package_of,
)
from nmlightning import swap_norms
from nmlightning.callbacks import Int8Swap, NormSwap, WeightNormSwap, WeightNormTracker, norm_swap
from nmlightning.callbacks.norm_swap import BackendNote
from nmlightning.errors import InputError
from nmlightning.kernels import norm_backend
from nmlightning.kernels.cpu import build
from nmlightning.kernels.interface import Dispatch
from nmlightning.norms import L1LayerNorm, MeanOnlyBatchNorm2d
from nmlightning.norms.batch_norm import L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d

pytestmark = pytest.mark.filterwarnings("ignore:.*Norm.* is replaced by .*Norm")


class HeadLate(PlModule):
    """Has another norm after `configure_model`."""

    def configure_model(self) -> None:
        if isinstance(self.net[0], nn.Conv2d):
            self.net[0] = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))


class GroupingByClass(PlModule):
    """Exempts norms from decay by the idiom that is in most training scripts."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        exempt = [q for m in norms for q in m.parameters(recurse=False)]
        decayed = [q for q in self.parameters() if all(q is not other for other in exempt)]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=0.1)


class Forgetful(PlModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


# What torch 2.11's compiler does with an autograd function, and warns of itself.
COMPILES = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")


@BOTH
class TestARun:
    def test_trains_validates_and_tests(self, module_class: type) -> None:
        module = make(module_class)
        weight = module.net[1].weight.detach().clone()
        fitted = fit(module, NormSwap("l1"))
        assert norm_types(module) == [L1BatchNorm2d] * 2
        assert not torch.equal(module.net[1].weight, weight)
        tested = fitted.test(module, make_data(), verbose=False)
        assert tested[0]["loss"] == pytest.approx(fitted.callback_metrics["loss"].item())

    @pytest.mark.parametrize("verb", ["validate", "test"])
    def test_evaluates_a_checkpoint(self, module_class: type, verb: str, tmp_path: Path) -> None:
        fitted = fit(make(module_class), NormSwap("linf"))
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        module = make(module_class)
        evaluate = getattr(make_trainer(module_class, NormSwap("linf")), verb)
        metrics = evaluate(module, make_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert norm_types(module) == [LInfBatchNorm2d] * 2
        assert metrics[0]["loss"] == pytest.approx(fitted.callback_metrics["loss"].item())

    @pytest.mark.parametrize("weights_only", [True, False])
    def test_checkpoints_say_what_the_norms_are(
        self, module_class: type, weights_only: bool, tmp_path: Path
    ) -> None:
        fitted = fit(make(module_class), NormSwap("topk", {"k": 3, "stats_dtype": torch.float64}))
        fitted.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        options = {"k": 3, "constant": "exact", "stats_dtype": "float64", "sync": False}
        options |= {"eps": 1e-5, "momentum": 0.1}
        note = {"norm": "TopKBatchNorm2d", "options": options}
        norms = {"net.1": note, "net.4": note}
        assert checkpoint["nmlightning"] == {
            "version": 2,
            "norms": norms,
            "weights": {},
            "int8": {},
        }
        assert ("optimizer_states" in checkpoint) == (not weights_only)

    @COMPILES
    def test_compiled_module_trains_as_the_plain_one(self, module_class: type) -> None:
        plain, module = make(module_class), make(module_class)
        fit(plain, NormSwap("l1"))
        compiled = torch.compile(module, backend="eager")
        make_trainer(module_class, NormSwap("l1")).fit(compiled, make_data(), make_data())
        assert norm_types(module) == [L1BatchNorm2d] * 2
        torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_norm_swap_may_be_the_only_callback() -> None:
    module = make(PlModule)
    fit(module, callbacks=NormSwap("linf"))
    assert norm_types(module) == [LInfBatchNorm2d] * 2


def test_earlier_optimizer_trains_the_swapped_norms() -> None:
    module = make(OwnOptimizer)
    before = [module.net[i].weight.detach().clone() for i in (1, 4)]
    fit(module, NormSwap("l1"))
    assert norm_types(module) == [L1BatchNorm2d] * 2
    for i, weight in zip((1, 4), before, strict=True):
        assert not torch.equal(module.net[i].weight, weight)


def test_pattern_matches_a_part_built_after_setup() -> None:
    module = make(HeadLate)
    fit(module, NormSwap("l1", include=["net.0.*"]))
    assert norm_types(module) == [L1BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]


@pytest.mark.parametrize("module_class", [PlModule, PlLate])
def test_latest_trainer_sets_the_norm(module_class: type) -> None:
    module = make(module_class)
    for norm, expected in (("l1", L1BatchNorm2d), ("linf", LInfBatchNorm2d)) * 2:
        fit(module, NormSwap(norm))
        assert norm_types(module) == [expected] * 2


def test_norm_swaps_of_different_layers() -> None:
    module = make(PlModule)
    fit(module, NormSwap("l1", include=["net.1"]), NormSwap("top10", include=["net.4"]))
    assert norm_types(module) == [L1BatchNorm2d, TopKBatchNorm2d]


class Replaces(pytorch_lightning.Callback):
    """Puts another layer in the place of the first norm, or none."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.net[1] = self.layer


@pytest.mark.parametrize(
    ("layer", "now"), [(nn.BatchNorm2d(4), "BatchNorm2d"), (nn.Identity(), "gone")]
)
def test_layer_replaced_after_the_swap_is_refused(layer: nn.Module, now: str) -> None:
    with pytest.raises(InputError, match=f"made net.1 L1BatchNorm2d, but it is {now}"):
        fit(make(PlModule), NormSwap("l1"), Replaces(layer))
    fit(make(PlModule), Replaces(nn.BatchNorm2d(4)), NormSwap("l1"))


def test_warns_of_untrained_parameters() -> None:
    with pytest.warns(UserWarning, match=r"trains 4 parameters .* such as net\.1\.weight"):
        fit(make(Forgetful), NormSwap("l1"))
    frozen = make(Forgetful)
    frozen.net[1:].requires_grad_(False)
    fit(frozen, NormSwap("l1"))


@pytest.mark.parametrize("module_class", [PlModule, PlLate])
def test_unmatched_pattern_is_refused(module_class: type) -> None:
    module = make(module_class)
    message = r"'layer1.\*' in exclude .* Its norm layers are net\.1 \(BatchNorm2d\)"
    with pytest.raises(InputError, match=message):
        fit(module, NormSwap("l1", exclude=["layer1.*"]))
    assert norm_types(module) == [nn.BatchNorm2d] * 2


@pytest.mark.parametrize("module_class", [PlModule, PlLate])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copy_is_swapped_on_its_own(module_class: type, duplicate: Any) -> None:
    module = make(module_class)
    fit(module, NormSwap("l1"))
    module.trainer = None
    twin = duplicate(module)
    fit(twin, NormSwap("linf"))
    checkpoint: dict[str, Any] = {}
    twin.on_save_checkpoint(checkpoint)
    assert norm_types(twin) == [LInfBatchNorm2d] * 2
    noted = checkpoint["nmlightning"]["norms"].values()
    assert [note["norm"] for note in noted] == ["LInfBatchNorm2d"] * 2
    assert norm_types(module) == [L1BatchNorm2d] * 2


@BOTH
def test_resume_without_the_callback_warns(module_class: type, tmp_path: Path) -> None:
    swaps = [NormSwap("l1"), NormSwap("l1", include=["net.1"])]
    fit(make(module_class), *swaps).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="add NormSwap") as caught:
        fit(make(module_class), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    (line,) = [str(w.message) for w in caught if "heckpoint" in str(w.message)]
    assert "2 l1 norms; 2 of them not here (net.1 is l2, not l1)" in line
    by_hand = make(module_class)
    swap_norms(by_hand, "l1")
    trainer = fit(by_hand, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    fit(make(module_class), NormSwap("l1"), max_epochs=3, ckpt_path=tmp_path / "b.ckpt")


@BOTH
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (WeightNormTracker(), "a WeightNormTracker, which this run lacks: it records no norms"),
        (WeightNormSwap(), r"weight norm on net\.0\.weight, net\.3\.weight, and here there"),
        (Int8Swap(), "int8 on net.0, net.1 and 3 more, and here there is none"),
    ],
    ids=["tracker", "weight norm", "int8"],
)
def test_resume_without_another_callback_says_what_is_left_out(
    module_class: type, callback: Any, message: str, tmp_path: Path
) -> None:
    callback, path = copy.deepcopy(callback), tmp_path / "a.ckpt"
    fit(make(module_class), callback, default_root_dir=tmp_path).save_checkpoint(path)
    warns = pytest.warns(UserWarning, match=f"{message}.* Add WeightNormTracker to the")
    name = type(callback).__name__
    refuses = pytest.raises(InputError, match=f"{message}.*: add {name} to the")
    is_tracker = isinstance(callback, WeightNormTracker)
    with warns if is_tracker else refuses:
        fit(make(module_class), max_epochs=2, ckpt_path=path)
    if is_tracker:  # a validation records nothing, and warns of nothing
        make_trainer(module_class).validate(make(module_class), make_data(), str(path), False)


@pytest.mark.parametrize("swap", [[], [NormSwap("l1")], [NormSwap("half_l2")]])
def test_grouping_by_class_finds_the_swapped_norms(swap: list[NormSwap]) -> None:
    (optimizer,) = fit(make(GroupingByClass), *swap).optimizers
    assert [len(group["params"]) for group in optimizer.param_groups][1] == 4


# ---- No hook turns a swapped norm back into L2 unseen. ----

REPLACED = r"NormSwap made net\.1 L1BatchNorm2d, but it is SyncBatchNorm: .* after the swap; Train"
HOOKS = {
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_train_batch_end",
}
OF_MODULES = HOOKS - {"on_sanity_check_start"} | {"configure_optimizers", "training_step"}
TOO_EARLY = {"configure_model", "prepare_data"}  # Lightning swaps after these


def convert(module: Any) -> None:
    """Do what code does that makes synchronised batch norms of others."""
    for i, layer in enumerate(module.net):
        if isinstance(layer, nn.BatchNorm2d):
            module.net[i] = nn.SyncBatchNorm(layer.num_features).train(layer.training)
            module.net[i].load_state_dict(layer.state_dict())


def converting(base: type, hook: str) -> Any:
    """Return a subclass of a callback or module that converts in one of its hooks."""

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        convert(self if isinstance(self, nn.Module) else args[1])
        return getattr(base, hook)(self, *args, **kwargs)

    return type("Converting", (base,), {hook: replacement})


@BOTH
@pytest.mark.parametrize("hook", sorted(OF_MODULES))
def test_module_converting_to_sync_is_refused(module_class: type, hook: str) -> None:
    with pytest.raises(InputError, match=REPLACED):
        fit(make(converting(module_class, hook)), NormSwap("l1"))


@BOTH
@pytest.mark.parametrize("hook", sorted(TOO_EARLY))
def test_module_converting_before_the_swap_is_swapped(module_class: type, hook: str) -> None:
    module = make(converting(module_class, hook))
    fit(module, NormSwap("l1"))
    assert [cls.__name__ for cls in norm_types(module)] == ["L1SyncBatchNorm"] * 2
    assert module.net[1].sync


@BOTH
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_callback_converting_to_sync_is_refused(module_class: type, hook: str, last: bool) -> None:
    other, swap = converting(package_of(module_class).Callback, hook)(), NormSwap("l1")
    module = make(module_class)
    if hook == "setup" and not last:  # it comes before the swap then
        fit(module, other, swap)
        assert [cls.__name__ for cls in norm_types(module)] == ["L1SyncBatchNorm"] * 2
        return
    with pytest.raises(InputError, match=REPLACED):
        fit(module, *([swap, other] if last else [other, swap]))


def test_conversion_is_refused_before_the_first_step() -> None:
    module = make(converting(PlModule, "on_train_batch_start"))
    before = module.net[0].weight.detach().clone()
    with pytest.raises(InputError, match=REPLACED):
        fit(module, NormSwap("l1"))
    assert torch.equal(module.net[0].weight, before)


@BOTH
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_converted_norm_evaluates_the_same(module_class: type, verb: str) -> None:
    """Evaluation is that of torch's own batch norm, so it needs no audit."""
    module = make(module_class)
    fit(module, NormSwap("l1"))
    losses = []
    for hook in ("on_exception", f"on_{'validation' if verb == 'validate' else verb}_start"):
        other = converting(package_of(module_class).Callback, hook)()
        trainer = make_trainer(module_class, NormSwap("l1"), other)
        losses += getattr(trainer, verb)(module, make_data(), verbose=False)
    assert [cls.__name__ for cls in norm_types(module)] == ["SyncBatchNorm"] * 2
    assert losses[0] == losses[1]


# ---- The log names the backend of the norms. ----


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def lines_of(model: nn.Module, x: Tensor) -> list[str]:
    """Return what is said of a model's norms after one forward pass, by the formula."""
    layers = {name: layer for name, layer in model.named_modules() if "Norm" in str(type(layer))}
    note = BackendNote(model, layers)
    with norm_backend("formula"):
        model(x)
        model(x)
    return note.describe()


def test_backend_note_counts_by_class_dtype_and_layout() -> None:
    first, again = L1BatchNorm2d(3), L1BatchNorm2d(3)
    model = nn.Sequential(first, again, ChannelsLast(), MeanOnlyBatchNorm2d(3), L1BatchNorm2d(3))
    assert lines_of(model, torch.randn(4, 3, 5, 5)) == [
        "2 L1BatchNorm2d by the formula (float32, NCHW): asked for",
        "1 MeanOnlyBatchNorm2d by the formula (float32, NHWC): no kernels for this norm",
        "1 L1BatchNorm2d by the formula (float32, NHWC): asked for",
    ]
    assert not first._forward_pre_hooks


def test_backend_note_names_tokens_and_strides() -> None:
    tokens = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    strided = torch.randn(8, 3, 2, dtype=torch.bfloat16).transpose(0, 2)
    (line,) = lines_of(L1LayerNorm(8), tokens)
    assert line == "1 L1LayerNorm by the formula (bfloat16, contiguous): asked for"
    assert "(bfloat16, strided)" in lines_of(L1LayerNorm(8), strided)[0]


def test_backend_note_skips_compiled_models() -> None:
    inner = nn.Sequential(L1BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(inner)
    inner.compile(backend="eager")
    assert lines_of(model, torch.randn(4, 3, 5, 5)) == ["1 L1BatchNorm2d by the formula, compiled"]
    assert not inner[0]._forward_pre_hooks


@BOTH
def test_norm_swap_logs_backends_once(module_class: type, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(make(module_class), NormSwap("l1"), max_epochs=2)
    said = [record.getMessage() for record in caplog.records if " by " in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("NormSwap: 2 L1BatchNorm2d by ")
    assert "(float32, NCHW)" in said[0]


def test_norm_swap_builds_kernels_if_told_and_says_what_a_resume_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch = Dispatch("formula", build.NOT_BUILT)
    monkeypatch.setattr(L1BatchNorm2d, "backend_for", lambda *_: dispatch)
    monkeypatch.setattr(norm_swap, "start_build", lambda _: "they are being built")
    before, swap = NormSwap("l1"), NormSwap("l1")
    before.backends, swap.builds_kernels = ["C++"], True
    swap.load_state_dict(before.state_dict())
    with caplog.at_level(logging.INFO):
        fit(make(PlModule), swap)
    backends, resumed = [x.getMessage() for x in caplog.records if "formula" in x.getMessage()]
    assert backends.endswith(" by the formula (float32, NCHW): they are being built")
    assert resumed == ("NormSwap: formula resumes a run by C++: equal to rounding, not bit for bit")
    assert swap.state_dict()["backends"] == ["formula"]


@pytest.mark.parametrize("by_hand", ["linf", "l2"])
def test_second_norm_swap_trains_after_a_swap_by_hand(by_hand: str) -> None:
    module = make(PlModule)
    fit(module, NormSwap("l1"))
    swap_norms(module.net, by_hand)
    fit(module, NormSwap("linf", include=["net.1"]))
    left = LInfBatchNorm2d if by_hand == "linf" else nn.BatchNorm2d
    assert norm_types(module) == [LInfBatchNorm2d, left]

"""Test NormSwap on LightningModules that have never heard of it, under both Lightning packages."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import (
    OwnOptimizer,
    PlLate,
    PlModule,
    UnifiedLate,
    UnifiedModule,
    make,
    make_trainer,
    norm_types,
)
from nmlightning.callbacks import NormSwap
from nmlightning.errors import InputError
from nmlightning.norms.batch_norm import L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d
from nmlightning.norms.mean_only import MeanOnlyBatchNorm2d
from nmlightning.surgery.recipes import NORM_SWAP, recipes_of


class HeadLate(PlModule):
    """Has another norm after `configure_model`."""

    def configure_model(self) -> None:
        if isinstance(self.net[0], nn.Conv2d):
            self.net[0] = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))


class Forgetful(PlModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


BOTH = pytest.mark.parametrize("module_class", [PlModule, UnifiedModule])
# What torch 2.11's compiler does with an autograd function, and warns of itself.
COMPILES = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")


def batches() -> DataLoader[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(3)
    images, labels = torch.randn(16, 2, 6, 6, generator=draw), torch.arange(16) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=4)


def fit(module: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    """Train `module` on four batches an epoch, with validation, and return its Trainer."""
    fitted = make_trainer(type(module), *callbacks, **options)
    fitted.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return fitted


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@BOTH
class TestARun:
    def test_it_trains_validates_and_tests(self, module_class: type) -> None:
        module = make(module_class)
        weight = module.net[1].weight.detach().clone()
        fitted = fit(module, NormSwap("l1"))
        assert norm_types(module) == [L1BatchNorm2d] * 2
        assert not torch.equal(module.net[1].weight, weight)
        tested = fitted.test(module, batches(), verbose=False)
        assert tested[0]["loss"] == pytest.approx(fitted.callback_metrics["loss"].item())

    @pytest.mark.parametrize(
        ("norm", "expected"), [("top10", TopKBatchNorm2d), ("mean", MeanOnlyBatchNorm2d)]
    )
    def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
        self, module_class: type, norm: str, expected: type, tmp_path: Path
    ) -> None:
        whole, first, second = (make(module_class) for _ in range(3))
        fit(whole, NormSwap(norm), max_epochs=2)
        fit(first, NormSwap(norm)).save_checkpoint(tmp_path / "a.ckpt")
        fit(second, NormSwap(norm), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
        assert norm_types(second) == [expected] * 2
        assert_same_weights(second, whole)

    @pytest.mark.parametrize("verb", ["validate", "test"])
    def test_a_new_trainer_evaluates_a_checkpoint(
        self, module_class: type, verb: str, tmp_path: Path
    ) -> None:
        fitted = fit(make(module_class), NormSwap("linf"))
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        module = make(module_class)
        evaluate = getattr(make_trainer(module_class, NormSwap("linf")), verb)
        metrics = evaluate(module, batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert norm_types(module) == [LInfBatchNorm2d] * 2
        assert metrics[0]["loss"] == pytest.approx(fitted.callback_metrics["loss"].item())

    @pytest.mark.parametrize("weights_only", [True, False])
    def test_every_checkpoint_carries_the_recipe(
        self, module_class: type, weights_only: bool, tmp_path: Path
    ) -> None:
        fitted = fit(make(module_class), NormSwap("topk", {"k": 3, "stats_dtype": torch.float64}))
        fitted.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        recipe = {"norm": "topk", "options": {"k": 3, "stats_dtype": "float64"}}
        rest = {"kinds": ["batch"], "include": [], "exclude": []}
        modules = {"net.1": "TopKBatchNorm2d", "net.4": "TopKBatchNorm2d"}
        assert checkpoint["nmlightning"] == {
            "version": 1,
            "norm_swaps": [{**recipe, **rest, "modules": modules}],
        }
        assert ("optimizer_states" in checkpoint) == (not weights_only)

    @COMPILES
    def test_a_compiled_module_trains_as_the_plain_one(self, module_class: type) -> None:
        plain, module = make(module_class), make(module_class)
        fit(plain, NormSwap("l1"))
        compiled = torch.compile(module, backend="eager")
        make_trainer(module_class, NormSwap("l1")).fit(compiled, batches(), batches())
        assert norm_types(module) == [L1BatchNorm2d] * 2
        torch.testing.assert_close(module.state_dict(), plain.state_dict())


@COMPILES
def test_a_net_compiled_inside_the_module() -> None:
    plain, module = make(PlModule), make(PlModule)
    module.net = torch.compile(module.net, backend="eager")
    fit(plain, NormSwap("l1", include=["net.1"]))
    fit(module, NormSwap("l1", include=["net.1"]))
    assert norm_types(module) == [L1BatchNorm2d, nn.BatchNorm2d]
    torch.testing.assert_close(module.net._orig_mod.state_dict(), plain.net.state_dict())


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_any_logger(logger: str, tmp_path: Path) -> None:
    log = getattr(pytorch_lightning.loggers, logger)(tmp_path)
    module = make(PlModule)
    fit(module, NormSwap("l1"), logger=log, default_root_dir=tmp_path)
    assert norm_types(module) == [L1BatchNorm2d] * 2


def test_it_may_stand_alone_instead_of_in_a_list() -> None:
    module = make(PlModule)
    fit(module, callbacks=NormSwap("linf"))
    assert norm_types(module) == [LInfBatchNorm2d] * 2


def test_an_optimizer_made_before_trains_the_swapped_norms() -> None:
    module = make(OwnOptimizer)
    before = [module.net[i].weight.detach().clone() for i in (1, 4)]
    fit(module, NormSwap("l1"))
    assert norm_types(module) == [L1BatchNorm2d] * 2
    for i, weight in zip((1, 4), before, strict=True):
        assert not torch.equal(module.net[i].weight, weight)


class TestConfigureModel:
    @pytest.mark.parametrize("module_class", [PlLate, UnifiedLate])
    def test_a_net_that_is_not_there_at_setup(self, module_class: type, tmp_path: Path) -> None:
        module = make(module_class)
        fitted = fit(module, NormSwap("l1"))
        assert norm_types(module) == [L1BatchNorm2d] * 2
        fitted.save_checkpoint(tmp_path / "a.ckpt")
        resumed = make(module_class)
        fit(resumed, NormSwap("l1"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
        fit(module, NormSwap("l1"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
        assert norm_types(resumed) == [L1BatchNorm2d] * 2
        assert_same_weights(resumed, module)

    def test_a_pattern_for_a_part_that_is_not_there_at_setup(self) -> None:
        module = make(HeadLate)
        fit(module, NormSwap("l1", include=["net.0.*"]))
        assert norm_types(module) == [L1BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]

    def test_a_pattern_that_matches_nothing_once_it_is_built(self) -> None:
        with pytest.raises(InputError, match=r"'nett' in include .* net\.1 \(BatchNorm2d\)"):
            fit(make(PlLate), NormSwap("l1", include=["nett"]))

    @pytest.mark.parametrize("module_class", [PlModule, PlLate])
    def test_the_norm_is_that_of_the_latest_trainer(self, module_class: type) -> None:
        module = make(module_class)
        for norm, expected in (("l1", L1BatchNorm2d), ("linf", LInfBatchNorm2d)) * 2:
            fit(module, NormSwap(norm))
            assert norm_types(module) == [expected] * 2
            assert [recipe["norm"] for recipe in recipes_of(module, NORM_SWAP)] == [norm]


class TestTwoSwaps:
    def test_the_last_wins_and_a_resume_passes(self, tmp_path: Path) -> None:
        whole, first, second = (make(PlModule) for _ in range(3))
        swaps = [NormSwap("l1", {"eps": 1e-3}), NormSwap("linf")]
        fit(whole, *swaps, max_epochs=2)
        assert norm_types(whole) == [LInfBatchNorm2d] * 2
        assert whole.net[1].eps == 1e-3
        fit(first, *swaps).save_checkpoint(tmp_path / "a.ckpt")
        fit(second, *swaps, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
        assert_same_weights(second, whole)

    def test_each_has_its_part(self) -> None:
        module = make(PlModule)
        fit(module, NormSwap("l1", include=["net.1"]), NormSwap("top10", include=["net.4"]))
        assert norm_types(module) == [L1BatchNorm2d, TopKBatchNorm2d]
        again = [NormSwap("l1", include=["net.1"]), NormSwap("top10", include=["net.4"])]
        fit(module, *again)
        assert [recipe["norm"] for recipe in recipes_of(module, NORM_SWAP)] == ["l1", "top10"]


class TestResumeWithAnother:
    @pytest.mark.parametrize(
        ("swaps", "answer"),
        [
            ([NormSwap("linf")], "NormSwap norm = 'top10', this run has norm = 'linf'"),
            (
                [NormSwap("top10", {"constant": "paper"})],
                "options = {}, this run has options = {'constant': 'paper'}",
            ),
            (
                [NormSwap("top10", include=["net.1"])],
                r"include = \[\], this run has include = \['net.1'\]",
            ),
            (
                [NormSwap("top10"), NormSwap("l1", include=["net.1"])],
                "'top10', this run has 'top10', 'l1'",
            ),
        ],
        ids=["norm", "option", "pattern", "number"],
    )
    def test_the_difference_is_named(
        self, swaps: list[NormSwap], answer: str, tmp_path: Path
    ) -> None:
        fit(make(PlModule), NormSwap("top10")).save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(InputError, match=answer):
            fit(make(PlModule), *swaps, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")

    def test_a_default_that_is_spelt_out_is_no_difference(self, tmp_path: Path) -> None:
        fit(make(PlModule), NormSwap("topk")).save_checkpoint(tmp_path / "a.ckpt")
        same = NormSwap("topk", {"k": 10, "constant": "exact"})
        fit(make(PlModule), same, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")

    def test_a_checkpoint_without_a_recipe(self, tmp_path: Path) -> None:
        fit(make(PlModule)).save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(InputError, match="trained with no NormSwap, this run has 'l1'"):
            fit(make(PlModule), NormSwap("l1"), ckpt_path=tmp_path / "a.ckpt")

    def test_a_recipe_of_a_newer_release(self, tmp_path: Path) -> None:
        fit(make(PlModule), NormSwap("l1")).save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        checkpoint["nmlightning"]["version"] = 2
        torch.save(checkpoint, tmp_path / "a.ckpt")
        with pytest.raises(InputError, match="has version 2, and this release reads 1"):
            fit(make(PlModule), NormSwap("l1"), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")


class Replaces(pytorch_lightning.Callback):
    """Puts another layer in the place of the first norm, or none."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.net[1] = self.layer


class TestAudit:
    @pytest.mark.parametrize(
        ("layer", "now"), [(nn.BatchNorm2d(4), "BatchNorm2d"), (nn.Identity(), "gone")]
    )
    def test_a_layer_that_was_replaced_after_the_swap(self, layer: nn.Module, now: str) -> None:
        with pytest.raises(InputError, match=f"made net.1 a L1BatchNorm2d, but it is {now}"):
            fit(make(PlModule), NormSwap("l1"), Replaces(layer))
        fit(make(PlModule), Replaces(nn.BatchNorm2d(4)), NormSwap("l1"))

    def test_parameters_that_no_optimizer_trains(self) -> None:
        with pytest.warns(UserWarning, match=r"trains 4 parameters .* such as net\.1\.weight"):
            fit(make(Forgetful), NormSwap("l1"))
        frozen = make(Forgetful)
        frozen.net[1:].requires_grad_(False)
        fit(frozen, NormSwap("l1"))


class TestInput:
    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            (("l11",), "no norm 'l11'.* Did you mean 'l1'"),
            (("l1", {"konstant": "paper"}), "no option 'konstant'.* Did you mean 'constant'"),
            ((None,), "There is no norm None; there are l2, l1"),
            (("l1", None, None), "kinds is a list of strings, got None"),
            (("l1", None, ["batch"], [1]), r"include is a list of strings, got \[1\]"),
            (("linf", None, ["layer"]), "'linf' is not defined for layer norms"),
            (("l1", None, "batch"), "kinds is a list, got the string 'batch'"),
            (("l1", None, ["batch"], "net.1"), "include is a list, got the string 'net.1'"),
            (("l1", None, ["batch"], [], "net.1"), "exclude is a list, got the string 'net.1'"),
        ],
    )
    def test_what_cannot_be_is_refused_on_construction(
        self, arguments: tuple[Any, ...], answer: str
    ) -> None:
        with pytest.raises(InputError, match=answer):
            NormSwap(*arguments)

    def test_a_pattern_that_matches_nothing(self) -> None:
        module = make(PlModule)
        with pytest.raises(InputError, match=r"Its norm layers are net\.1 \(BatchNorm2d\)"):
            fit(module, NormSwap("l1", exclude=["layer1.*"]))
        assert norm_types(module) == [nn.BatchNorm2d] * 2


class TestTheModuleAfterwards:
    def test_setup_again_adds_nothing(self) -> None:
        module = make(PlModule)
        for _ in range(2):
            fit(module, NormSwap("l1"))
            assert len(recipes_of(module, NORM_SWAP)) == 1
            assert recipes_of(module, NORM_SWAP)[0]["modules"] == dict.fromkeys(
                ("net.1", "net.4"), "L1BatchNorm2d"
            )

    @pytest.mark.parametrize("module_class", [PlModule, PlLate])
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
    )
    def test_a_copy_goes_its_own_way(self, module_class: type, duplicate: Any) -> None:
        module = make(module_class)
        fit(module, NormSwap("l1"))
        module.trainer = None
        twin = duplicate(module)
        fit(twin, NormSwap("linf"))
        checkpoint: dict[str, Any] = {}
        twin.on_save_checkpoint(checkpoint)
        assert norm_types(twin) == [LInfBatchNorm2d] * 2
        assert [r["norm"] for r in checkpoint["nmlightning"]["norm_swaps"]] == ["linf"]
        assert norm_types(module) == [L1BatchNorm2d] * 2
        assert [recipe["norm"] for recipe in recipes_of(module, NORM_SWAP)] == ["l1"]


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_resume_without_it_is_warned_of(package: str, tmp_path: Path) -> None:
    module_class = PlModule if package == "pytorch_lightning" else UnifiedModule
    trainer_class = importlib.import_module(package).Trainer
    options: dict[str, Any] = {
        "max_steps": 1,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    data = DataLoader(TensorDataset(torch.randn(4, 2, 8, 8), torch.arange(4) % 3), batch_size=4)
    trainer = trainer_class(
        callbacks=[NormSwap("l1"), NormSwap("l1", include=["net.1"])], **options
    )
    trainer.fit(module_class(), data, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*NormSwap"):
        trainer_class(**options).fit(module_class(), data, data, ckpt_path=tmp_path / "last.ckpt")

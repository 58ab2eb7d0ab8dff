"""Every shipped config runs, shortened, and says what the experiment of its name is."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nmlightning.cli import main
from nmlightning.commands.config_files import find_config, shipped_configs
from nmlightning.errors import InputError
from nmlightning.weights.history import NormHistory

CONFIGS = shipped_configs()
CIFAR = {
    "cifar_l2": None,
    "cifar_l1": ("l1", "exact"),
    "cifar_linf": ("linf", "exact"),
    "cifar_top10": ("top10", "exact"),
    "cifar_linf_paper": ("linf", "paper"),
    "cifar_top10_paper": ("top10", "paper"),
    "cifar_l1_unscaled": ("l1", "none"),
}
NORMALISED = {
    "cifar_wn": ("weight", 2),
    "cifar_bwn": ("bounded", 2),
    "cifar_bwn_l1": ("bounded", 1),
    "cifar_bwn_linf": ("bounded", float("inf")),
}
# The weight norm and the learning rate; the one of BWN is the paper's.
IMAGENET = {"imagenet_resnet50_wn": ("weight", 0.1), "imagenet_resnet50_bwn": ("bounded", 0.2)}
SHORT_RUN = shlex.split(
    "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 2 "
    "--trainer.limit_val_batches 1 --trainer.enable_model_summary false "
    "--trainer.enable_progress_bar false"
)
SHORT = [*shlex.split("--data Digits --data.image_size 8 --data.batch_size 8"), *SHORT_RUN]
ONE_PAGE = 50  # lines
STUDY = {
    "wd_on": ("all", None),
    "wd_off": ("last_layer", None),
    "lr_correction": ("last_layer", "LRCorrection"),
    "norm_schedule": ("last_layer", "NormSchedule"),
    "exponential_lr": ("no_conv", "DecayEquivalentLR"),
}
FAMILIES = ("study", "study_short")


def read(name: str) -> dict[str, Any]:
    config = yaml.safe_load(CONFIGS[name].read_text("utf-8"))
    assert isinstance(config, dict)
    return config


def test_shipped_are_the_quickstart_and_the_papers_experiments() -> None:
    studies = [f"{family}_{name}" for family in FAMILIES for name in STUDY]
    assert list(CONFIGS) == ["quickstart", *sorted([*CIFAR, *NORMALISED, *IMAGENET, *studies])]


@pytest.mark.parametrize("name", ["quickstart", *CIFAR])
def test_config_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", f"configs/{name}.yaml", *SHORT]) == 0
    last = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    swaps = checkpoint.get("nmlightning", {"norm_swaps": []})["norm_swaps"]
    expected = CIFAR.get(name, ("l1", "exact"))
    constants = [(swap["norm"], swap["options"].get("constant", "exact")) for swap in swaps]
    assert constants == ([expected] if expected else [])
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.parametrize("name", NORMALISED)
def test_config_with_normalised_weights_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "--trainer.precision", "32-true"]
    assert main(["fit", "--config", f"configs/{name}.yaml", *words]) == 0
    last = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    recipes = torch.load(last, weights_only=True)["nmlightning"]
    assert [swap["norm"] for swap in recipes["norm_swaps"]] == ["mean"]
    (recipe,) = recipes["weight_norms"]
    assert (recipe["kind"], recipe["p"]) == NORMALISED[name]
    assert len(recipe["modules"]) == 55


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_config_runs(
    name: str,
    make_image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_image_folder()
    monkeypatch.chdir(tmp_path)
    words = [*SHORT_RUN, "--trainer.precision", "32-true", "--model.net.num_classes", "3"]
    words += ["--data.root", str(root), "--data.image_size", "32", "--data.batch_size", "4"]
    assert main(["fit", "--config", name, *words, "--data.num_workers", "0"]) == 0
    last = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    recipes = checkpoint["nmlightning"]
    assert [swap["norm"] for swap in recipes["norm_swaps"]] == ["mean"]
    (recipe,) = recipes["weight_norms"]
    assert (recipe["kind"], recipe["p"], len(recipe["modules"])) == (IMAGENET[name][0], 2, 53)
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_imagenet_configs_are_the_papers_experiment() -> None:
    configs = [read(name) for name in IMAGENET]
    for config, (kind, lr) in zip(configs, IMAGENET.values(), strict=True):
        model, trainer = config["model"]["init_args"], config["trainer"]
        assert model["net"] == {"class_path": "ResNet50", "init_args": {"scale_branches": True}}
        assert model["optimizer"]["init_args"].pop("lr") == lr
        assert model["optimizer"]["init_args"] == {"momentum": 0.9, "weight_decay": 0}
        assert model["lr_scheduler"]["init_args"] == {"milestones": [30, 60], "gamma": 0.1}
        assert config["data"]["class_path"] == "ImageNet"
        assert config["data"]["init_args"]["batch_size"] == 256
        assert (trainer["max_epochs"], trainer["precision"]) == (90, "16-mixed")
        mean, weights = trainer.pop("callbacks")
        assert mean == {"class_path": "NormSwap", "init_args": {"norm": "mean"}}
        assert weights == {"class_path": "WeightNormSwap", "init_args": {"kind": kind, "p": 2}}
    assert configs[0] == configs[1], "but for the weight norm and the learning rate"


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_configs_are_the_papers_experiment(name: str) -> None:
    config = read(name)
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert model["net"] == {"class_path": "CifarResNet", "init_args": {"depth": 56}}
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert model["lr_scheduler"]["init_args"] == {"milestones": [81, 122, 164], "gamma": 0.1}
    assert config["data"] == {
        "class_path": "CIFAR10",
        "init_args": {"root": "data", "batch_size": 128},
    }
    assert (trainer["max_epochs"], trainer["precision"]) == (200, "16-mixed")


def test_cifar_configs_differ_in_the_norm_alone() -> None:
    configs = [read(name) for name in CIFAR]
    for config in configs:
        config["trainer"].pop("callbacks", None)
    assert all(config == configs[0] for config in configs)


def test_configs_with_normalised_weights_differ_in_the_norm_alone() -> None:
    plain, *configs = [read(name) for name in ("cifar_l2", *NORMALISED)]
    for config, (kind, p) in zip(configs, NORMALISED.values(), strict=True):
        mean, weights = config["trainer"].pop("callbacks")
        assert mean == {"class_path": "NormSwap", "init_args": {"norm": "mean"}}
        assert weights["class_path"] == "WeightNormSwap"
        assert weights["init_args"] == {"kind": kind, "p": "inf" if p == float("inf") else p}
        model = config["model"]["init_args"]
        assert model["net"]["init_args"].pop("scale_branches")
        assert model["optimizer"]["init_args"].pop("weight_decay") == 0
    plain["model"]["init_args"]["optimizer"]["init_args"].pop("weight_decay")
    assert all(config == plain for config in configs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_study_runs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, since two of the runs follow the recording of the first."""
    monkeypatch.chdir(tmp_path)
    for seed, name in [("1", "wd_on"), *(("2", name) for name in STUDY)]:
        config = f"configs/{family}_{name}.yaml"
        words = [*SHORT, "--data.image_size", "32", "--trainer.precision", "32-true"]
        assert main(["fit", "--config", config, *words, "--seed_everything", seed]) == 0
        folder = max((tmp_path / "runs" / f"{family}_{name}").glob("version_*"))
        assert NormHistory.load(folder).steps.tolist() == [0, 2]
        assert NormHistory.load(folder).provenance["seed"] == int(seed)
    assert main(["compare", "runs"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_study_configs_differ_in_what_they_compare_alone(family: str) -> None:
    configs = [read(f"{family}_{name}") for name in STUDY]
    for config, (scope, rule) in zip(configs, STUDY.values(), strict=True):
        assert config["model"]["init_args"].pop("weight_decay_scope", "all") == scope
        (tracker,) = config["trainer"].pop("callbacks")
        steering = tracker.get("init_args", {}).get("steering", {})
        assert steering.get("class_path") == rule
        decay = config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"]
        assert steering.get("init_args", {}).get("weight_decay", decay) == decay
    assert all(config == configs[0] for config in configs)


def test_the_short_study_has_the_decay_of_the_whole_one() -> None:
    """η · λ · T is the same: the learning rates are, and so is their share of the steps."""
    products = []
    for family, batches in (("study", 391), ("study_short", 80)):
        config = read(f"{family}_wd_on")
        model, trainer = config["model"]["init_args"], config["trainer"]
        assert trainer.get("limit_train_batches", 391) == batches
        assert trainer["max_epochs"] == 4 * model["lr_scheduler"]["init_args"]["step_size"]
        optimizer = model["optimizer"]["init_args"]
        assert (optimizer["lr"], optimizer["momentum"]) == (0.1, 0.9)
        products.append(optimizer["weight_decay"] * trainer["max_epochs"] * batches)
    assert products[1] == pytest.approx(products[0], rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_one_page_and_says_what_it_is(name: str) -> None:
    lines = CONFIGS[name].read_text("utf-8").splitlines()
    assert len(lines) <= ONE_PAGE
    assert [line.startswith("# ") for line in lines[:3]] == [True, True, False]


@pytest.mark.parametrize("given", ["configs/{}.yaml", "{}.yaml", "{}"])
def test_a_name_means_the_shipped_config(given: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(given.format("cifar_l1")) == CONFIGS["cifar_l1"]
    (tmp_path / "configs").mkdir()
    for own in (
        tmp_path / "configs" / "cifar_l1.yaml",
        tmp_path / "cifar_l1.yaml",
        Path("cifar_l1"),
    ):
        own.touch()
    assert find_config(given.format("cifar_l1")) == Path(given.format("cifar_l1"))


def test_an_unknown_name_lists_the_shipped_configs() -> None:
    shipped = ", ".join(CONFIGS)
    with pytest.raises(InputError, match=f"are {shipped}. Did you mean 'cifar_l1'?"):
        find_config("configs/cifar_1.yml")

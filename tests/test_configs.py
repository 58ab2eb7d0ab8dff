"""Every shipped config runs, shortened, and says what the experiment of its name is."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from made_sentences import write_pairs
from nmlightning.cli import main
from nmlightning.commands.argument_parser import DIVERGED
from nmlightning.commands.files import find_config, shipped_configs
from nmlightning.surgery.recipes import NORMS, WEIGHTS, recipe_in, what_trains
from nmlightning.weights.history import NormHistory
from quickstart_runs import SHORT
from translation_runs import draw_pairs

CONFIGS = shipped_configs()
CIFAR = {
    "cifar_l2": None,
    "cifar_l1": ("l1", "exact"),
    "cifar_linf": ("linf", "exact"),
    "cifar_top10": ("top10", "exact"),
    "cifar_linf_paper": ("linf", "paper"),
    "cifar_top10_paper": ("top10", "paper"),
    "cifar_l1_unscaled": ("l1", "none"),
    "cifar_l1_cuda": ("l1", "exact"),
    "cifar_l2_cuda": None,
}
HELD = ("cifar_adamh", "cifar_muonh")  # by Hyperball
NORMALISED = {
    "cifar_wn": ("weight", 2),
    "cifar_bwn": ("bounded", 2),
    "cifar_bwn_l1": ("bounded", 1),
    "cifar_bwn_linf": ("bounded", float("inf")),
}
# The weight norm and the learning rate; the one of BWN is the paper's.
NORMALISED_IMAGENET = {
    "imagenet_resnet50_wn": ("weight", 0.1),
    "imagenet_resnet50_bwn": ("bounded", 0.2),
}
EXACT = {"constant": "exact"}
HALF = {**EXACT, "stats_dtype": "float16"}
# The norm that is swapped in, and the layers whose weights are normalised.
TRANSLATION: dict[str, tuple[str | None, list[str] | None]] = {
    "wmt14_transformer_ln": (None, None),
    "wmt14_transformer_l1": ("l1", None),
    "wmt14_transformer_bwn": (None, ["linear"]),
    "wmt14_lstm_ln": (None, None),
    "wmt14_lstm_l1": ("l1", None),
    "wmt14_lstm_bwn": (None, ["linear", "recurrent"]),
    "multi30k_transformer_ln": (None, None),
    "multi30k_transformer_l1": ("l1", None),
    "multi30k_transformer_bwn": (None, ["linear"]),
    "translate_quickstart": ("l1", None),
}
TRANSLATED = ("wmt14_transformer", "wmt14_lstm", "multi30k_transformer")
# The norm and its options.
IMAGENET: dict[str, tuple[str, dict[str, str]] | None] = {
    "imagenet_resnet18_l2": None,
    "imagenet_resnet18_l1": ("l1", EXACT),
    "imagenet_resnet18_linf": ("linf", EXACT),
    "imagenet_resnet18_top10": ("top10", EXACT),
    "imagenet_resnet18_l2_fp16": ("half_l2", {}),
    "imagenet_resnet18_l1_fp16": ("l1", HALF),
    "imagenet_resnet50_l2": None,
    "imagenet_resnet50_l1": ("l1", EXACT),
    "imagenet_resnet50_l1_fp16": ("l1", HALF),
}
# The options that are not the default of Int8Swap, the float config that it is else, and its keys.
INT8: dict[str, tuple[dict[str, Any], str]] = {
    "quickstart_int8": ({}, "quickstart"),
    "cifar_int8": ({}, "cifar_l2"),
    "cifar_int8_l1": ({"norms": "l1"}, "cifar_l2"),
    "imagenet_resnet18_int8": ({}, "imagenet_resnet18_l2"),
    "imagenet_resnet50_int8": ({}, "imagenet_resnet50_l2"),
}
PLAIN = {"rounding": "nearest", "bifurcate": False}
STUDY_INT8: dict[str, tuple[dict[str, Any], str]] = {
    f"study_int8_{bits}_{kind}": ({"gradient_bits": bits, **options}, "study_int8_8_both")
    for bits in (8, 4, 2)
    for kind, options in (("both", {}), ("plain", PLAIN))
}
ON_DIGITS = [*shlex.split("--data Digits --data.image_size 8 --data.batch_size 8"), *SHORT]
ONE_PAGE = 50  # lines
STUDY = {
    "wd_on": ("all", None),
    "wd_off": ("last_layer", None),
    "lr_correction": ("last_layer", "LRCorrection"),
    "norm_schedule": ("last_layer", "NormSchedule"),
    "exponential_lr": ("no_conv", "DecayEquivalentLR"),
}
FAMILIES = ("study", "study_short")
Fit = Callable[..., tuple[Any, Any, Any]]
PARTS = (("train", 1), ("val", 2))


def read(name: str) -> dict[str, Any]:
    """Return a config, without the tracker, which is first: options change the last callback."""
    config = yaml.safe_load(CONFIGS[name].read_text("utf-8"))
    assert isinstance(config, dict)
    if not name.startswith(FAMILIES):
        callbacks = config["trainer"].pop("callbacks")
        assert callbacks.pop(0) == {"class_path": "WeightNormTracker"}
        config["trainer"] |= {"callbacks": callbacks} if callbacks else {}
    return config


def test_shipped_configs_are_the_quickstart_and_the_papers_experiments() -> None:
    studies = [f"{family}_{name}" for family in FAMILIES for name in STUDY]
    names = [*CIFAR, *NORMALISED, *IMAGENET, *NORMALISED_IMAGENET, *TRANSLATION, *studies]
    names += [*INT8, *STUDY_INT8, *HELD]
    assert list(CONFIGS) == ["quickstart", *sorted(names)]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run a config; return its last checkpoint, and the swapped norms and weight norms in it."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> tuple[Any, Any, Any]:
        fails = name.endswith("l2_fp16")  # in half, L2's gradient overflows at a small deviation
        code = main(["fit", "--config", name, *words])
        assert code in ((0, DIVERGED) if fails else (0,))
        folder = tmp_path / "runs" / Path(name).stem / "version_0"
        checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        tensors = {k: v for k, v in checkpoint["state_dict"].items() if not k.endswith(".order")}
        assert fails or all(tensor.isfinite().all() for tensor in tensors.values())
        norms, weights = (recipe_in(checkpoint, kind) for kind in (NORMS, WEIGHTS))
        recorded = NormHistory.load(folder, finite=not fails).norms
        assert all({n, f"{n}_v"} <= recorded.keys() for n in weights)
        assert len(recorded) >= 11
        trained = [what_trains(note) for note in norms.values()]
        swaps = [{**note, "norm": "top10"} if "k" in note else note for note in trained]
        return checkpoint, [note for note in swaps if note["norm"] != "l2"], weights

    return run


WHOLE = ["--trainer.precision", "32-true"]


@pytest.mark.parametrize("name", ["quickstart", *CIFAR, *NORMALISED])
def test_config_runs(fit: Fit, name: str) -> None:
    words = ["--model.net.depth", "14", *(WHOLE if name in NORMALISED else [])]
    words += ["--model.compile", "null"] if name.endswith("cuda") else []  # which takes a minute
    _, swaps, normalised = fit(f"configs/{name}.yaml", *ON_DIGITS, *words)
    expected = ("mean", None) if name in NORMALISED else CIFAR.get(name, ("l1", "exact"))
    assert {(norm["norm"], norm.get("constant")) for norm in swaps} == {expected} - {None}
    found = [(note["kind"], note["p"]) for note in normalised.values()]
    assert found == ([NORMALISED[name]] * 13 if name in NORMALISED else [])


@pytest.mark.parametrize("name", HELD)
def test_config_holds_the_norms_of_weights(fit: Fit, name: str) -> None:
    fit(name, *ON_DIGITS, "--model.net.depth", "14")
    history = NormHistory.load(f"runs/{name}/version_0")
    for channels in history.norms.values():
        norms = np.linalg.norm(channels.astype(np.float64), axis=1)
        assert norms == pytest.approx(norms[0], rel=1e-5)
        assert not np.allclose(channels[-1], channels[0], rtol=1e-4)


@pytest.mark.parametrize("name", [*INT8, *STUDY_INT8])
def test_int8_config_runs(fit: Fit, image_folder: Path, name: str, tmp_path: Path) -> None:
    options, other = {**INT8, **STUDY_INT8}[name]
    config, plain = read(name), read(other)
    callback = config["trainer"].pop("callbacks")[-1]
    assert callback["class_path"] == "Int8Swap"
    assert {"gradient_bits": 8, **callback.get("init_args", {})} == {"gradient_bits": 8, **options}
    words = [*ON_DIGITS, "--data.image_size", "16", *WHOLE]
    if name.startswith("imagenet"):
        model = config["model"]["init_args"]
        model["net"].pop("init_args")
        assert model.pop("weight_decay_scope") == "no_norm"
        model["lr_scheduler"]["class_path"] = "torch.optim.lr_scheduler.MultiStepLR"
        assert model["lr_scheduler"]["init_args"].pop("warmup_epochs") == 5
        words = ["--data.root", str(image_folder), "--data.num_workers", "0", *SHORT]
        words += shlex.split("--data.image_size 128 --data.batch_size 4 --model.net.num_classes 3")
    plain["trainer"].pop("callbacks", None)
    plain["trainer"].pop("precision", None)
    config["trainer"].pop("precision", None)
    assert config == plain
    checkpoint, *_ = fit(name, *words)
    made = checkpoint["nmlightning"]["int8"]
    norm = options.get("norms", "range")
    found = {note["swapped_to"]["norm"].lower() for note in made.values() if "swapped_to" in note}
    assert found == {f"{norm}batchnorm2d"}
    assert {note["gradient_bits"] for note in made.values()} == {options.get("gradient_bits", 8)}


@pytest.mark.parametrize("name", [*IMAGENET, *NORMALISED_IMAGENET])
def test_imagenet_config_runs(fit: Fit, image_folder: Path, name: str) -> None:
    normed = name in NORMALISED_IMAGENET
    norm, options = ("mean", {}) if normed else (IMAGENET[name] or (None, {}))
    # The ten largest of 4 images need 2×2 places each, which are what is left of 64×64.
    words = ["--data.image_size", "64" if norm == "top10" else "32", "--data.batch_size", "4"]
    words += ["--data.root", str(image_folder), "--data.num_workers", "0"]
    words += [*SHORT, "--model.net.num_classes", "3", *(WHOLE if normed else [])]
    checkpoint, swaps, normalised = fit(name, *words)
    assert bool(swaps) == bool(norm)
    assert all(swap == {**swap, "norm": norm, **options} for swap in swaps)
    assert {x.get("stats_dtype") for x in swaps} <= {options.get("stats_dtype")}
    kinds = [(note["kind"], note["p"]) for note in normalised.values()]
    assert kinds == ([(NORMALISED_IMAGENET[name][0], 2)] * 53 if normed else [])
    (optimizer,) = checkpoint["optimizer_states"]
    lr = NORMALISED_IMAGENET[name][1] if normed else 0.1
    assert {group["lr"] for group in optimizer["param_groups"]} == {lr * 4 / 256}


def test_imagenet_configs_with_normalised_weights_are_the_papers_experiment() -> None:
    configs = [read(name) for name in NORMALISED_IMAGENET]
    for config, (kind, lr) in zip(configs, NORMALISED_IMAGENET.values(), strict=True):
        model, trainer = config["model"]["init_args"], config["trainer"]
        assert model["net"] == {"class_path": "ResNet50", "init_args": {"scale_branches": True}}
        assert model["optimizer"]["init_args"].pop("lr") == lr
        assert model["optimizer"]["init_args"] == {"momentum": 0.9, "weight_decay": 0}
        assert model["lr_scheduler"]["init_args"] == {"milestones": [30, 60], "gamma": 0.1}
        mean, weights = trainer.pop("callbacks")
        assert mean == {"class_path": "NormSwap", "init_args": {"norm": "mean"}}
        assert weights == {"class_path": "WeightNormSwap", "init_args": {"kind": kind, "p": 2}}
    assert configs[0] == configs[1], "but for the weight norm and the learning rate"


def test_imagenet_configs_are_the_papers_experiment() -> None:
    configs = [read(name) for name in IMAGENET]
    for config, (name, swap) in zip(configs, IMAGENET.items(), strict=True):
        model = config["model"]["init_args"]
        depth = name.removeprefix("imagenet_resnet")[:2]
        assert model.pop("net") == {"class_path": f"ResNet{depth}"}
        assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
        assert model["lr_scheduler"]["init_args"] == {"milestones": [30, 60, 80], "gamma": 0.1}
        (callback,) = config["trainer"].pop("callbacks", [None])
        init_args = callback and callback["init_args"]
        norm, options = swap or (None, {})
        assert init_args == (norm and {"norm": norm, **({"options": options} if options else {})})
    assert all(config == configs[0] for config in configs), "but for the network and its norm"


@pytest.mark.parametrize("name", [*IMAGENET, *NORMALISED_IMAGENET])
def test_imagenet_configs_have_one_batch_and_schedule(name: str) -> None:
    config = read(name)
    data = {"class_path": "ImageNet", "init_args": {"root": "data/imagenet", "batch_size": 256}}
    assert config["data"] == data
    assert config["model"]["init_args"]["lr_batch_size"] == 256
    trainer = config["trainer"]
    assert (trainer["max_epochs"], trainer["precision"]) == (90, "16-mixed")


@pytest.mark.parametrize("name", TRANSLATION)
def test_translation_config_runs(fit: Fit, name: str, tmp_path: Path) -> None:
    norm, layers = TRANSLATION[name]
    train, val = (write_pairs(tmp_path, part, draw_pairs(40, seed)) for part, seed in PARTS)
    words = ["--data", "ParallelText", "--data.train", str(train), "--data.val", str(val)]
    words += shlex.split("--data.vocab_size 280 --data.tokens_a_batch 300 --model.net.width 16")
    if "transformer" in name:
        words += shlex.split(
            "--model.net.heads 2 --model.net.hidden 16 --model.net.encoder_layers 2"
        )
        words += ["--model.net.decoder_layers", "2"]
    _, swaps, normalised = fit(name, *words, *SHORT, "--trainer.val_check_interval=2", *WHOLE)
    assert {swap["norm"] for swap in swaps} == {norm} - {None}
    assert bool(normalised) == bool(layers)
    assert any("_hh_" in x for x in normalised) == ("recurrent" in (layers or ()))


@pytest.mark.parametrize("family", TRANSLATED)
def test_translation_configs_differ_in_the_norm_alone(family: str) -> None:
    configs = [read(f"{family}_{norm}") for norm in ("ln", "l1", "bwn")]
    for config in configs:
        config["trainer"].pop("callbacks", None)
        for key in ("norm", "scale_branches", "tied", "layer_norm"):
            config["model"]["init_args"]["net"]["init_args"].pop(key, None)
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("norm", ["ln", "l1", "bwn"])
def test_transformer_config_is_the_papers_base_model(norm: str) -> None:
    config = read(f"wmt14_transformer_{norm}")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["optimizer"]["init_args"] == {"lr": 7e-4, "betas": [0.9, 0.98], "eps": 1e-9}
    assert model["optimizer"]["init_args"]["lr"] == pytest.approx((512 * 4000) ** -0.5, rel=0.01)
    assert model["lr_scheduler"]["init_args"] == {"warmup_steps": 4000}
    assert (data["vocab_size"], data["tokens_a_batch"]) == (32000, 25000)
    assert model["net"]["init_args"]["vocab_size"] == data["vocab_size"]


@pytest.mark.parametrize("name", [name for name in TRANSLATION if name.startswith("wmt14")])
def test_translation_config_validates_after_steps_in_any_epoch(name: str) -> None:
    """Else Lightning refuses an interval that is longer than the epoch of many processes."""
    trainer = read(name)["trainer"]
    assert trainer["val_check_interval"] == 5000
    assert trainer["check_val_every_n_epoch"] is None


def test_cifar_configs_are_the_papers_experiment() -> None:
    configs = [read(name) for name in CIFAR]
    for config in configs:
        config["trainer"].pop("callbacks", None)
        for name in ("compile", "channels_last"):  # of the recipes for CUDA
            config["model"]["init_args"].pop(name, None)
        config["model"]["init_args"]["optimizer"]["init_args"].pop("fused", None)
    assert all(config == configs[0] for config in configs), "but for the norm"
    model, trainer = configs[0]["model"]["init_args"], configs[0]["trainer"]
    assert model["net"] == {"class_path": "CifarResNet", "init_args": {"depth": 56}}
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert model["lr_scheduler"]["init_args"] == {"milestones": [81, 122, 164], "gamma": 0.1}
    data = {"class_path": "CIFAR10", "init_args": {"root": "data", "batch_size": 128}}
    assert configs[0]["data"] == data
    assert (trainer["max_epochs"], trainer["precision"]) == (200, "16-mixed")


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
def test_study_configs_run(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, since two of the runs follow the recording of the first."""
    monkeypatch.chdir(tmp_path)
    for seed, name in [("1", "wd_on"), *(("2", name) for name in STUDY)]:
        config = f"configs/{family}_{name}.yaml"
        words = [*ON_DIGITS, "--data.image_size", "32", "--trainer.precision", "32-true"]
        words += ["--model.net.width", "4"]
        assert main(["fit", "--config", config, *words, "--seed_everything", seed]) == 0
        folder = max((tmp_path / "runs" / f"{family}_{name}").glob("version_*"))
        assert NormHistory.load(folder).steps.tolist() == [0, 2]
        assert NormHistory.load(folder).provenance["seed"] == int(seed)
    assert main(["compare", "runs"]) == 0
    written = set(tmp_path.rglob("*"))
    for name in STUDY:
        config = ["--config", f"{family}_{name}", "--seed_everything", "2"]
        assert main(["fit", *config, *words, "--trainer.fast_dev_run", "true"]) == 0
    assert set(tmp_path.rglob("*")) == written


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


def test_short_study_config_decays_as_the_whole_study() -> None:
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
def test_config_fits_one_page_and_describes_itself(name: str) -> None:
    lines = CONFIGS[name].read_text("utf-8").splitlines()
    assert len(lines) <= ONE_PAGE
    assert [line.startswith("# ") for line in lines[:3]] == [True, True, False]


@pytest.mark.parametrize("given", ["configs/{}.yaml", "{}.yaml", "{}"])
def test_find_config_resolves_a_shipped_name(given: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(given.format("cifar_l1")) == CONFIGS["cifar_l1"]
    (tmp_path / "configs").mkdir()
    for own in (tmp_path / "configs/cifar_l1.yaml", tmp_path / "cifar_l1.yaml", Path("cifar_l1")):
        own.touch()
    assert find_config(given.format("cifar_l1")) == Path(given.format("cifar_l1"))

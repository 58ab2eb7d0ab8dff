"""Public names: imported when first used, and also where they were before modules were moved."""

from importlib import import_module

import pytest

import nmlightning
from nmlightning.functional.statistics import PowerMean
from nmlightning.lazy_exports import RENAMED

# The public package, and what it had from which module: the path in pickles and whole class paths.
HOMES = """
nmlightning: checkpoints.load_from_checkpoint errors.InputError probe.probe_norms
nmlightning: surgery.swap_norms swap_report.SwapReport export.folding.FoldReport
nmlightning: export.folding.fold_norms export.network.ExportReport export.network.export_network
nmlightning: weights.channel_norms.ChannelLayout weights.channel_norms.channel_norms
nmlightning: weights.history.NormHistory weights.parameter_groups.parameter_groups
nmlightning.callbacks: norm_swap.NormSwap weight_norm_swap.WeightNormSwap
nmlightning.callbacks: weight_norm_tracker.WeightNormTracker
nmlightning.datamodules: cifar10.CIFAR10 digits.Digits imagenet.ImageNet wmt14.WMT14
nmlightning.datamodules: number_names.NumberNames parallel_text.ParallelText
nmlightning.models: imagenet_resnet.ResNet18 imagenet_resnet.ResNet50 lstm.AttentionLSTM
nmlightning.models: resnet.CifarResNet vgg.VGG transformer.Transformer translated_relu.TReLU
nmlightning.norms: gaussian.gaussian_constant layer_norm.L1LayerNorm layer_norm.LpLayerNorm
nmlightning.norms: quantization_noise.QuantizationNoise rms_norm.L1RMSNorm rms_norm.LpRMSNorm
nmlightning.norms.kernels: dispatch.norm_backend
nmlightning.tasks: classification.ImageClassifier inverse_square_root.InverseSquareRootLR
nmlightning.tasks: line_translation.LineOptions line_translation.translate_lines
nmlightning.tasks: translation.Translator
nmlightning.weights.steering: decay_equivalent_lr.DecayEquivalentLR
nmlightning.weights.steering: hyperball.Hyperball lr_correction.LRCorrection
nmlightning.weights.steering: norm_schedule.NormSchedule radial_projection.RadialProjection
nmlightning.weights.weight_norm: apply.apply_weight_norm apply.remove_weight_norm
nmlightning.weights.weight_norm: weight_norm.WeightNorm
"""
BATCH_NORMS = {"half_l2": "HalfL2", "mean_only": "MeanOnly", "range_batch_norm": "Range"}
for _home, _sorts in {"batch_norm": "L1 LInf Lp TopK", **BATCH_NORMS}.items():
    for _sort in _sorts.split():
        _names = [f"{_home}.{_sort}BatchNorm{suffix}" for suffix in ("", "1d", "2d", "3d")]
        HOMES += f"nmlightning.norms: {' '.join(_names)}\n"
LINES = [line.split(": ") for line in HOMES.strip().splitlines()]
PLACES = [(package, place) for package, places in LINES for place in places.split()]


@pytest.mark.parametrize(("package", "place"), PLACES)
def test_an_older_path_is_the_public_object(package: str, place: str) -> None:
    home, _, name = place.rpartition(".")
    older = getattr(import_module(f"{package}.{home}"), name)
    assert older is getattr(import_module(package), name)


@pytest.mark.parametrize(
    "former",
    [*RENAMED, "norms.kernels.cpu.backend", "weights.steering.step_hooks", "fusing.fused_class"],
)
def test_a_renamed_module_is_the_present_one(former: str) -> None:
    module = import_module(f"nmlightning.{former}")
    now = f"nmlightning.{RENAMED[former]}" if former in RENAMED else module.__name__
    assert module is import_module(now)


def test_a_renamed_package_has_no_other_modules() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        import_module("nmlightning.weights.steering.nothing")


def test_an_older_pickle_of_a_statistic_has_its_constant() -> None:
    statistic = PowerMean.__new__(PowerMean)
    statistic.__setstate__({"p": 1.0})
    assert statistic == PowerMean(1.0)
    assert statistic.constant(1, "exact") == pytest.approx(1.2533141)


@pytest.mark.parametrize(
    "package", ["nmlightning", *(f"nmlightning.{x}" for x in ("models", "datamodules", "tasks"))]
)
def test_lazy_exports_lists_and_loads_every_name(package: str) -> None:
    module = import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert {getattr(module, name).__name__ for name in module.__all__} == set(module.__all__)


@pytest.mark.parametrize("package", ["models", "datamodules", "tasks"])
def test_nmlightning_has_what_its_packages_have(package: str) -> None:
    names = set(import_module(f"nmlightning.{package}").__all__)
    namespace: dict[str, object] = {}
    exec("from nmlightning import *", namespace)
    assert names <= namespace.keys() & set(dir(nmlightning))


def test_lazy_exports_refuse_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'nmlightning' has no attribute 'L3BatchNorm'"):
        nmlightning.L3BatchNorm  # noqa: B018

"""Holds the architecture: arrows point down only, short files, and an import that costs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nmlightning"
MAX_LINES = 400

# From top to bottom. A name stands for a module or a whole folder; the longest match counts. Each
# may import from the lines below its own, and inside itself, never from a neighbour on its line.
LAYERS = [
    ["nmlightning.__main__"],
    ["nmlightning.cli"],
    ["nmlightning.commands"],
    ["nmlightning"],
    ["nmlightning.callbacks", "nmlightning.tasks", "nmlightning.datamodules"],
    ["nmlightning.compat", "nmlightning.checkpoints", "nmlightning.export"],
    ["nmlightning.surgery", "nmlightning.probe"],
    ["nmlightning.fusing", "nmlightning.swap_report"],
    ["nmlightning.swappable", "nmlightning.recipes"],
    ["nmlightning.norms", "nmlightning.weights"],
    [
        "nmlightning.weights.recorder",
        "nmlightning.weights.steering",
        "nmlightning.weights.weight_norm",
        "nmlightning.reports",
    ],
    ["nmlightning.weights.layer_weights", "nmlightning.weights.optimizer_family"],
    ["nmlightning.weights.weight_place"],
    ["nmlightning.weights.channel_norms"],
    ["nmlightning.norms.half_trial"],
    ["nmlightning.norms.registry", "nmlightning.norms.serving"],
    ["nmlightning.norms.range_batch_norm"],
    [
        "nmlightning.norms.batch_norm",
        "nmlightning.norms.half_l2",
        "nmlightning.norms.layer_norm",
        "nmlightning.norms.mean_only",
        "nmlightning.norms.rms_norm",
    ],
    [
        "nmlightning.norms.batch_norm_base",
        "nmlightning.norms.batch_norm_function",
        "nmlightning.norms.half_batch_norm_function",
        "nmlightning.norms.half_centre_function",
        "nmlightning.norms.layer_norm_function",
        "nmlightning.norms.quantization_noise",
    ],
    ["nmlightning.norms.fused_activation"],
    ["nmlightning.norms.kernels"],
    ["nmlightning.norms.gradient_sums"],
    ["nmlightning.norms.slope"],
    ["nmlightning.norms.statistics"],
    ["nmlightning.norms.chunk_range", "nmlightning.norms.power_mean"],
    ["nmlightning.norms.selection", "nmlightning.norms.settings"],
    ["nmlightning.norms.accumulation"],
    [
        "nmlightning.models",
        "nmlightning.norms.blocks",
        "nmlightning.norms.cross_rank",
        "nmlightning.norms.first_derivative",
        "nmlightning.norms.gaussian",
        "nmlightning.norms.half_range",
        "nmlightning.norms.in_half",
        "nmlightning.weights.channel_summaries",
        "nmlightning.weights.history",
        "nmlightning.weights.parameter_groups",
    ],
    [
        "nmlightning.after_method",
        "nmlightning.weights.history_arrays",
        "nmlightning.weights.official_pickle",
        "nmlightning.weights.output_layer",
        "nmlightning.weights.plain_name",
        "nmlightning.weights.recorded_clock",
        "nmlightning.weights.recording_file",
        "nmlightning.weights.shards",
    ],
    ["nmlightning.text"],
    ["nmlightning.weights.inert_unpickler", "nmlightning.name_patterns"],
    ["nmlightning.errors"],
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
USE_LIGHTNING = {
    "nmlightning.commands",
    "nmlightning.callbacks",
    "nmlightning.tasks",
    "nmlightning.datamodules",
    "nmlightning.compat",
}


def find_modules() -> dict[str, Path]:
    """Return every module of the package, by its dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


MODULES = find_modules()


def find_imports(module: str) -> Iterator[str]:
    """Yield the dotted name of everything `module` imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import in line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def find_place(module: str) -> str:
    """Return the entry of `LAYERS` that `module` belongs to."""
    parts = module.split(".")
    shortest = min(len(parts), 2)  # only the package's own __init__ is on the line of "nmlightning"
    names = [".".join(parts[:length]) for length in range(len(parts), shortest - 1, -1)]
    place = next((name for name in names if name in DEPTH), None)
    assert place, f"{module} has no place yet: give it one in LAYERS"
    return place


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    place = find_place(module)
    imported = {find_place(name) for name in find_imports(module) if name.startswith("nmlightning")}
    assert {name for name in imported - {place} if DEPTH[name] <= DEPTH[place]} == set()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_upper_layers_import_lightning(module: str) -> None:
    tops = {name.split(".")[0] for name in find_imports(module)}
    uses_lightning = not tops.isdisjoint({"lightning", "pytorch_lightning"})
    assert find_place(module) in USE_LIGHTNING or not uses_lightning


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_idea(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_import_is_free() -> None:
    code = "import sys, nmlightning, nmlightning.cli; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert {"torch", "lightning", "pytorch_lightning"}.isdisjoint(result.stdout.split())

"""Holds the architecture: arrows point down only, short files, and an import that costs nothing."""

import structure
from scripts import run_python

USE_LIGHTNING = {
    "nmlightning.commands",
    "nmlightning.callbacks",
    "nmlightning.translation",
    "nmlightning.tasks",
    "nmlightning.compat",
    "nmlightning.datamodules",
}
PACKAGE = structure.Package()


def assert_none(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


def test_arrows_point_down() -> None:
    circle = structure.find_circle(PACKAGE.graph())
    assert_none([*structure.Layers().upward_arrows(PACKAGE), *circle])


def test_only_the_upper_layers_import_lightning() -> None:
    place = structure.Layers().place
    lower = [name for name in PACKAGE.modules if place(name) not in USE_LIGHTNING]
    tops = {name: {imported.split(".")[0] for imported in PACKAGE.imports(name)} for name in lower}
    assert_none([name for name in lower if tops[name] & {"lightning", "pytorch_lightning"}])


def test_a_file_holds_one_idea() -> None:
    small, excused = set(PACKAGE.small_files()), structure.EXCEPTIONS.keys()
    unused = [f"{file} needs no exception any more" for file in sorted(excused - small)]
    assert_none([*PACKAGE.long_files(), *sorted(small - excused), *unused])


def test_the_sources_keep_their_targets() -> None:
    missed = [figure for figure in structure.source_figures(PACKAGE) if figure.is_lost]
    assert_none([f"{name}: {now:,}, not {target:,}" for name, now, target, _ in missed])


def test_runs_keep_their_targets() -> None:
    run_python(structure.__file__, "--runs")


def test_import_is_free() -> None:
    code = "import sys, nmlightning, nmlightning.cli; dir(nmlightning); print(*sys.modules)"
    heavy = {"torch", "lightning", "pytorch_lightning", "matplotlib", "plotly"}
    assert heavy.isdisjoint(run_python("-c", code).stdout.split())

"""Measures the structure of the package and prints each figure beside its target.

    python tests/support/structure.py [--runs] [ROOT]

ROOT holds nmlightning/ and tests/; `--runs` leaves out what the sources alone tell. What a figure
that misses its target counts is below it. The exit code is 1 for one that misses `REACHED`, too.

- A module imports another where an `import` anywhere in its file names it, but for those of an
  `__init__` for the types only. Of the modules with one importer those are left out that the
  `__init__` of their package imports, since they are public. The longest chain leaves out imports
  in functions, and nmlightning's own `__init__`, which is lazy.
- A file is met where a function of it runs; what an `import` executes does not count.
- The batch is a layer's second: the first loads the kernels. The model is a ResNet-20. A file of
  norms is met by the constructor of `LRCorrection` and `attach`, then in a step of SGD without
  momentum. The config is the quickstart's, from the command's words to the call of `Trainer.fit`.
"""

import argparse
import ast
import functools
import graphlib
import io
import logging
import os
import re
import sys
import tempfile
import textwrap
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from pytorch_lightning import LightningModule, Trainer

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
MIN_LINES = 60
MAX_BODY = 40

# From top to bottom. A name stands for a module or a whole folder; the longest match counts. Each
# may import from the rows below its own, and inside itself, never from a neighbour in its row.
LAYERS = [
    ["nmlightning.cli"],
    ["nmlightning.commands"],
    ["nmlightning.callbacks", "nmlightning.translation", "nmlightning.probe.inference"],
    ["nmlightning.tasks", "nmlightning.export", "nmlightning.probe", "nmlightning.compat"],
    ["nmlightning.surgery", "nmlightning.tracking"],
    ["nmlightning.parametrizations", "nmlightning.int8"],
    ["nmlightning.optim", "nmlightning.norms", "nmlightning.reports"],
    ["nmlightning.weights", "nmlightning.kernels", "nmlightning.named_code"],
    [
        "nmlightning.functional",
        "nmlightning.models",
        "nmlightning.datamodules",
        "nmlightning.atomic_file",
        "nmlightning.yaml_text",
    ],
    [
        "nmlightning.allocator",
        "nmlightning.errors",
        "nmlightning.lazy_exports",
        "nmlightning.name_patterns",
    ],
]
# Files under MIN_LINES with fewer than two importers: each with the reason why it stands alone.
EXCEPTIONS = {
    "__main__.py": "`python -m nmlightning` asks for it",
    "commands/kernels.py": "`nm kernels` asks for it",
}
# Of the targets that are missed: what was reached, which must not be left again.
REACHED = {
    "Python files": 179,
    "lines of nmlightning, Python and C++": 38_193,
    "lines of tests": 33_749,
    "longest import chain": 19,
    "files a recording meets in a step": 8,
    "files a config meets before Trainer.fit": 22,
}

Graph = Mapping[str, Collection[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figure(NamedTuple):
    """A measurement, None where there can be none; the target, if there is one; what it counts."""

    name: str
    now: int | None
    target: int | None
    counted: Collection[str] = ()

    @property
    def is_missed(self) -> bool:
        return self.now is not None and self.target is not None and self.now > self.target

    @property
    def is_lost(self) -> bool:
        return self.is_missed and (self.now or 0) > REACHED.get(self.name, 0)


class Package:
    """The sources of nmlightning: its modules by dotted name, and its files with their lines."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.folder = root / "nmlightning"
        paths = [p for p in sorted(self.folder.rglob("*")) if p.suffix in (".py", ".h", ".cpp")]
        self.texts = {str(p.relative_to(self.folder)): p.read_text("utf-8") for p in paths}
        self.lines = {file: len(text.splitlines()) for file, text in self.texts.items()}
        self.modules: dict[str, str] = {}
        for file in self.texts:
            if file.endswith(".py"):
                name = ".".join(Path("nmlightning", file).with_suffix("").parts)
                self.modules[name.removesuffix(".__init__")] = file
        self.trees = {name: ast.parse(self.texts[file]) for name, file in self.modules.items()}

    def imports(self, module: str, in_functions: bool = True) -> set[str]:
        """Return the dotted name of everything that a module imports, ours or not."""
        found: set[str] = set()
        is_init = self.modules[module].endswith("__init__.py")
        nodes: list[ast.AST] = [self.trees[module]]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import in line {node.lineno}"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in self.modules else str(node.module) for name in names)
            is_lazy = isinstance(node, Function) and not in_functions
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not is_lazy and not (for_types and is_init):
                nodes.extend(ast.iter_child_nodes(node))
        return found - {module}

    def graph(self, in_functions: bool = True) -> Graph:
        """Return which of our modules each of them imports, the lazy `nmlightning` left out."""
        names = self.modules.keys() - {"nmlightning"}
        return {name: self.imports(name, in_functions) & names for name in sorted(names)}

    def long_files(self) -> list[str]:
        """Return the files that are too long, with their lines."""
        return [f"{file} ({lines})" for file, lines in self.lines.items() if lines > MAX_LINES]

    def small_files(self) -> list[str]:
        """Return the small files that fewer than two others import or include; no `__init__`."""
        users = {self.modules[name]: n for name, n in count_importers(self.graph()).items()}
        includes = re.findall(r'#include ".*?([^/"]+)"', "\n".join(self.texts.values()))
        small = [file for file, lines in self.lines.items() if lines < MIN_LINES]
        uses = {file: users.get(file, includes.count(Path(file).name)) for file in small}
        return [file for file in small if uses[file] < 2 and not file.endswith("__init__.py")]

    def long_functions(self) -> list[str]:
        """Return the functions with too many lines behind their docstrings."""
        return [
            f"{name}.{node.name}"
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, Function)
            for statements in [node.body[ast.get_docstring(node) is not None :]]
            if statements and (node.end_lineno or 0) - statements[0].lineno >= MAX_BODY
        ]


class Layers:
    """A table of layers."""

    def __init__(self, rows: list[list[str]] = LAYERS) -> None:
        # The package's own __init__ re-exports all below the commands, which show its version.
        self._depths = {"nmlightning": 1.5}
        self._depths.update((name, depth) for depth, row in enumerate(rows) for name in row)

    def place(self, module: str) -> str:
        """Return the name in the table that stands for a module, or "" where there is none."""
        name = "nmlightning.cli" if module == "nmlightning.__main__" else module
        while name.count(".") > 1 and name not in self._depths:
            name = name.rpartition(".")[0]
        return name if name in self._depths else ""

    def upward_arrows(self, package: Package) -> list[str]:
        """Return the imports that run up or sideways, and the modules without a row."""
        places = {name: self.place(name) for name in package.modules}
        arrows = [
            f"{name} → {other}"
            for name in package.modules
            for other in sorted(package.imports(name) & places.keys())
            if (here := places[name]) and (there := places[other]) and here != there
            if self._depths[there] <= self._depths[here]
        ]
        return [f"{name} has no row" for name, place in places.items() if not place] + arrows


def count_importers(graph: Graph) -> dict[str, int]:
    """Return how many modules import each of them."""
    return {name: sum(name in imported for imported in graph.values()) for name in graph}


def find_lonely(graph: Graph) -> list[str]:
    """Return the modules that one other imports, unless it is the `__init__` of their package."""
    importers = count_importers(graph)
    names = [name for name in graph if importers[name] == 1]
    return [name for name in names if name not in graph.get(name.rpartition(".")[0], ())]


def find_circle(graph: Graph) -> list[str]:
    """Return modules each of which imports the one before it and the first the last, or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def longest_chain(graph: Graph) -> tuple[str, ...]:
    """Return the most modules of which each imports the next, where there is no circle."""
    chains: dict[str, tuple[str, ...]] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        below = [chains[imported] for imported in sorted(graph[name])]
        chains[name] = (name, *max(below, key=len, default=()))
    return max(chains.values(), key=len)


def source_figures(package: Package) -> list[Figure]:
    """Return the figures that the sources alone tell."""
    tests = [path.read_text("utf-8") for path in (package.root / "tests").rglob("*.py")]
    graph = package.graph(in_functions=False)
    lonely = find_lonely(package.graph())
    chain = longest_chain(graph)
    circle = find_circle(package.graph())
    arrows = Layers().upward_arrows(package)
    largest = max(package.lines, key=lambda file: package.lines[file])
    long = package.long_files()
    small = [file for file in package.small_files() if file not in EXCEPTIONS]
    bodies = package.long_functions()
    return [
        Figure("Python files", len(package.modules), 150),
        Figure("lines of nmlightning, Python and C++", sum(package.lines.values()), 25_500),
        Figure("lines of tests", sum(len(text.splitlines()) for text in tests), 24_500),
        Figure("modules with one importer", len(lonely), 29, lonely),
        Figure("longest import chain", len(chain), 18, chain),
        Figure("rows of the layer table", len(LAYERS), 10),
        Figure("modules in a circle", len(circle), 0, circle),
        Figure("arrows that run up", len(arrows), 0, arrows),
        Figure("lines of the largest file", package.lines[largest], MAX_LINES, [largest]),
        Figure(f"files over {MAX_LINES} lines", len(long), 0, long),
        Figure(f"files under {MIN_LINES} lines against the size rule", len(small), 0, small),
        Figure(f"functions over {MAX_BODY} lines", len(bodies), None, bodies),
    ]


def run_figures(package: Package) -> list[Figure]:
    """Return the figures of what runs; files are written into the current folder."""
    sys.path.insert(0, str(package.root))
    formula, kernel = (_meet_batch(package, backend) for backend in ("formula", "auto"))
    attach, step = _meet_recording(package)
    config = _meet_config(package)  # before the model's swap, which watches modules from then on
    runs = [
        ("a batch meets in an L1 norm, formula", 8, formula),
        ("a batch meets in an L1 norm, kernel", 8, kernel),
        ("a model meets in NormSwap.setup", 12, _meet_model(package)),
        ("a recording meets in LRCorrection.attach", 12, attach),
        ("a recording meets in a step", 7, step),
        ("a config meets before Trainer.fit", 15, config),
    ]
    figures = [Figure(f"files {name}", len(met), goal, sorted(met)) for name, goal, met in runs]
    figures[1] = figures[1]._replace(now=None if kernel == formula else len(kernel))  # not built
    return figures


@contextmanager
def _files_met(package: Package) -> Iterator[set[str]]:
    """Give the set to which each file is added when a function of it runs."""
    met: set[str] = set()
    prefix = f"{package.folder}{os.sep}"

    def note(frame: FrameType | None, event: str, _: Any) -> None:
        path = frame.f_code.co_filename if frame else ""
        if event == "call" and path.startswith(prefix):
            while frame and not _is_import(frame, prefix):
                frame = frame.f_back
            if frame is None:
                met.add(path.removeprefix(prefix))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield met
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _is_import(frame: FrameType, prefix: str) -> bool:
    return frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(prefix)


def _meet_batch(package: Package, backend: Any) -> set[str]:
    import nmlightning

    layer = nmlightning.L1BatchNorm2d(8)
    for _ in range(2):
        x = torch.randn(4, 8, 5, 5, requires_grad=True)
        with nmlightning.norm_backend(backend), _files_met(package) as met:
            layer(x).sum().backward()
    return met


def _meet_model(package: Package) -> set[str]:
    from nmlightning.callbacks import NormSwap
    from nmlightning.models import CifarResNet

    module, swap = LightningModule(), NormSwap("l1")
    module.net = CifarResNet(20)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[swap])
    with _files_met(package) as met:
        swap.setup(trainer, module, "fit")
    return met


def _meet_recording(package: Package) -> tuple[set[str], set[str]]:
    import nmlightning
    from nmlightning.models import CifarResNet

    net = CifarResNet(20)
    weights = {name: p.detach() for name, p in net.named_parameters() if p.ndim == 4}
    norms = {name: [nmlightning.channel_norms(w).tolist()] * 2 for name, w in weights.items()}
    recording = Path("weight_norms.safetensors")
    nmlightning.NormHistory.from_arrays(norms, [0, 10], [0, 0]).save(recording)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with _files_met(package) as attach:
        nmlightning.LRCorrection(recording).attach(optimizer, net.named_parameters())
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    with _files_met(package) as step:
        optimizer.step()
    return attach, step


def _meet_config(package: Package) -> set[str]:
    from nmlightning.cli import main as nm

    class Reached(BaseException):
        """Stands for the training."""

    @functools.wraps(Trainer.fit)  # its signature is parsed
    def fit(*_: Any, **__: Any) -> None:
        raise Reached

    config = package.root / "configs" / "quickstart.yaml"
    with mock.patch.object(Trainer, "fit", fit), suppress(Reached), _files_met(package) as met:
        nm(["fit", "--config", str(config)])
    return met


def main() -> int:
    """Print the table, and return 1 if a figure misses its target and what was once reached."""
    parser = argparse.ArgumentParser(description="Measure the structure of the package.")
    parser.add_argument("root", type=Path, nargs="?", default=ROOT, help="of the repository")
    parser.add_argument("--runs", action="store_true", help="only the figures of what runs")
    options = parser.parse_args()
    package = Package(options.root.resolve())
    figures = [] if options.runs else source_figures(package)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        os.chdir(folder)
        figures += run_figures(package)
        os.chdir(package.root)
    print(f"{'figure':<50}{'now':>10}{'target':>10}")
    for figure in figures:
        now = "not built" if figure.now is None else f"{figure.now:,}"
        target = "" if figure.target is None else f"{figure.target:,}"
        print(f"{figure.name:<50}{now:>10}{target:>10}{' !' * figure.is_missed}")
        counted = ", ".join(figure.counted) if figure.is_missed else ""
        for line in textwrap.wrap(counted, 92):
            print(f"    {line}")
    return int(any(figure.is_lost for figure in figures))


if __name__ == "__main__":
    sys.exit(main())

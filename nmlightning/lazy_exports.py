"""Public names of a package, imported when first used, and the modules that were renamed."""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

RENAMED = {
    "models.translated_relu": "models.activation",
    "norms.half_l2": "norms.low_precision",
    "norms.range_batch_norm": "norms.batch_norm",
    "norms.rms_norm": "norms.layer_norm",
    "norms.statistics": "functional.statistics",
    "weights.steering": "optim",
}
"""Former modules that pickles and checkpoints of 0.1.0 name. Of a package that was renamed all
modules are found that it still has."""


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package's `__init__`.

    The names are those that the `__init__` imports `as` themselves. Those under `if TYPE_CHECKING:`
    are imported when they are first used: they may lie in packages above, or need torch.
    """
    spec = find_spec(package) if package not in sys.modules else sys.modules[package].__spec__
    loader: Any = spec.loader if spec else None
    tree = ast.parse(loader.get_source(package))
    lazy = [
        node
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    ]
    homes = {alias.name: str(node.module) for node in lazy for alias in node.names}
    eager = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    aliases = [alias.asname for node in eager for alias in node.names]
    names = sorted({*homes, *filter(None, aliases)})

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return load, list_names, names


class RenamedModules(MetaPathFinder, Loader):
    """Finds a renamed module under its former name, as one and the same module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where the module is now, or None for any that was not renamed."""
        return ModuleSpec(fullname, self) if _present_name(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that it is now in the place of `module`."""
        sys.modules[module.__name__] = import_module(str(_present_name(module.__name__)))


def _present_name(former: str) -> str | None:
    """Return the present name of a module that was renamed, itself or with its package."""
    root, _, name = former.partition(".")
    packages = [old for old in RENAMED if f"{name}.".startswith(f"{old}.")]
    if root != "nmlightning" or not packages:
        return None
    package = max(packages, key=len)
    present = f"nmlightning.{RENAMED[package]}{name.removeprefix(package)}"
    return present if name == package or find_spec(present) else None

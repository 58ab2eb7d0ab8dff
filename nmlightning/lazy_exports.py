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
    "callbacks.kept_recording": "weights.recorder",
    "checkpoints": "surgery.checkpoints",
    "fusing": "surgery.fuse",
    "fusing.rewriting": "surgery.fuse.patterns",
    "datamodules.batch_transform": "datamodules.image_data",
    "datamodules.hub_pairs": "translation.sources",
    "datamodules.number_names": "translation.datamodules",
    "datamodules.parallel_text": "translation.datamodules",
    "datamodules.wmt14": "translation.datamodules",
    "models.attention": "translation.transformer",
    "models.imagenet_resnet": "models.resnet",
    "models.lstm": "translation.lstm",
    "models.recurrent_layer": "translation.lstm",
    "models.tied_words": "translation.embedding",
    "models.transformer": "translation.transformer",
    "models.transformer_layers": "translation.transformer",
    "models.translated_relu": "models.activation",
    "norms.gaussian": "functional.constants",
    "norms.kernels": "kernels",
    "norms.half_l2": "norms.low_precision",
    "norms.quantization_noise": "norms.low_precision",
    "norms.range_batch_norm": "norms.batch_norm",
    "norms.statistics": "functional.statistics",
    "norms.rms_norm": "norms.layer_norm",
    "swap_report": "surgery.swap",
    "tasks.inverse_square_root": "optim.schedules",
    "tasks.line_translation": "translation.task",
    "tasks.mean_loss": "tasks.classification",
    "tasks.perplexity": "translation.metrics",
    "tasks.training_window": "translation.metrics",
    "tasks.translation": "translation.task",
    "tasks.translation_metrics": "translation.metrics",
    "text": "translation",
    "text.encoded_pairs": "translation.corpus",
    "text.number_names": "translation.sources",
    "text.parallel_files": "translation.sources",
    "weights.parameter_groups": "optim.param_groups",
    "weights.steering": "optim",
    "weights.weight_norm": "parametrizations",
    "export.folding": "export.fold",
    "export.network": "export.export",
}
"""Former modules of public names and of what their objects hold, which class paths in YAML,
checkpoints and pickles may name. Of a package that was renamed all modules are found that it still
has."""


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

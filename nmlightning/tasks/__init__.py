"""The LightningModules: what is trained, and what is logged about it."""

from typing import TYPE_CHECKING

from nmlightning.lazy_exports import lazy_exports
from nmlightning.optim.schedules import InverseSquareRootLR as InverseSquareRootLR
from nmlightning.tasks.classification import ImageClassifier as ImageClassifier

if TYPE_CHECKING:
    from nmlightning.translation.task import LineOptions as LineOptions
    from nmlightning.translation.task import Translator as Translator
    from nmlightning.translation.task import translate_lines as translate_lines

__getattr__, __dir__, __all__ = lazy_exports(__name__)

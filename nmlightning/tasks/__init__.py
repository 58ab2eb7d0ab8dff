"""The LightningModules: what is trained, and what is logged about it."""

from nmlightning.tasks.classification import ImageClassifier as ImageClassifier
from nmlightning.tasks.inverse_square_root import InverseSquareRootLR as InverseSquareRootLR
from nmlightning.tasks.line_translation import LineOptions as LineOptions
from nmlightning.tasks.line_translation import translate_lines as translate_lines
from nmlightning.tasks.translation import Translator as Translator

"""Two ranks measure what one process does: perplexities, BLEU, and the BLEU to publish.

Run as a script it is one of the ranks: `python test_task_on_ranks.py FOLDER`.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nmlightning.translation.task import Translator
from scripts import run_python
from trainers import quiet_trainer
from translation_runs import WORDS, make_net, make_text, make_translator

EVALUATED = ("loss", "ppl", "word_ppl", "bleu")
# Lightning speaks through that of the package that was imported last.
LOGGERS = ("pytorch_lightning", "lightning.pytorch")


class Lines(logging.Handler):
    """Keeps the lines of the task."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Translator"):
            self.lines.append(record.getMessage())


def make_task() -> Translator:
    """Return one whose translations are those of a dictionary with a mistake."""
    torch.manual_seed(0)
    task = make_translator(make_net())
    mistaken = {**WORDS, "drei": "tree"}

    def translate(source: Tensor, **_: Any) -> list[str]:
        sentences = task.tokenizer.decode(source.tolist())
        return [" ".join(mistaken[word] for word in sentence.split()) for sentence in sentences]

    task.translate = translate  # type: ignore[method-assign]
    return task


def measure(folder: Path, processes: int) -> dict[str, Any]:
    """Return the metrics of validation and test, and what was said of the latter."""
    lines = Lines()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(lines)
    trainer = quiet_trainer(devices=processes, strategy="ddp" if processes > 1 else "auto")
    task, data = make_task(), make_text(folder)
    (validated,) = trainer.validate(task, data, verbose=False)
    (tested,) = trainer.test(task, data, verbose=False)
    for logger in loggers:
        logger.removeHandler(lines)
    return {**validated, **tested, "lines": lines.lines}


@pytest.mark.filterwarnings("ignore")
def test_translator_on_two_ranks_measures_as_on_one(tmp_path: Path) -> None:
    run_python(__file__, tmp_path)
    two = json.loads((tmp_path / "two.json").read_text("utf-8"))
    one = measure(tmp_path, 1)
    assert two.pop("lines") == one.pop("lines")
    assert two == pytest.approx(one, rel=1e-5)
    assert 0 < one["test/bleu"] < 100
    assert set(one) == {f"{s}/{n}" for s in ("val", "test") for n in EVALUATED}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    measured = measure(place, 2)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (place / "two.json").write_text(json.dumps(measured), "utf-8")

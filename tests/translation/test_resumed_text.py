"""A run on text whose batches are others when it is resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from made_sentences import fit, make_pairs, make_text, write_pairs
from nmlightning.errors import InputError
from nmlightning.translation.tokenizer import JointBPE
from trainers import SaveAt


@pytest.mark.parametrize("when", ["on_train_batch_end", "on_train_epoch_end"])
def test_text_run_may_change_batches_between_epochs(tmp_path: Path, when: str) -> None:
    batches = fit(make_text(tmp_path), max_epochs=1)
    save = SaveAt(len(batches.seen), tmp_path / "end.ckpt", when)
    fit(make_text(tmp_path), callbacks=[save], max_epochs=1)
    resumed = fit(make_text(tmp_path, tokens_a_batch=400), ckpt_path=save.path, max_epochs=2)
    other = fit(make_text(tmp_path, tokens_a_batch=400), max_epochs=2)
    expected = [
        tokens
        for tokens, epoch in zip(other.seen.values(), other.epochs, strict=True)
        if epoch == 1
    ]
    torch.testing.assert_close([*resumed.seen.values()], expected)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within the first epoch of a run on made sentences."""
    folder = tmp_path_factory.mktemp("interrupted")
    fit(make_text(folder), callbacks=[SaveAt(3, folder / "mid.ckpt")], max_epochs=1)
    return folder / "mid.ckpt"


def _other_pairs(folder: Path) -> dict[str, Any]:
    pairs = make_pairs(90)
    pairs[40] = pairs[40]._replace(target="another")
    JointBPE.train((side for pair in make_pairs(90) for side in pair), 300).save(folder / "bpe")
    files = write_pairs(folder, "other", pairs)
    return {"tokenizer": str(folder / "bpe"), "files": files}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"tokens_a_batch": 300}, "with 200 tokens a batch, and this run has 300"),
        (lambda _: {"vocab_size": 299}, "with [0-9a-f]+ as its tokenizer, and this run has"),
        (lambda _: {"train": 91, "vocab_size": 260}, "as its tokenizer"),
        (lambda _: {"too_long": "drop", "max_length": 8}, "with 90 sentence pairs, and this run"),
        (_other_pairs, "of other sentence pairs, so the rest"),
    ],
)
@pytest.mark.filterwarnings("ignore:Of the training pairs")
def test_text_run_refuses_another_order(
    interrupted: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    options = change(tmp_path)
    files = options.pop("files", None)
    data = make_text(tmp_path, **options)
    data.train_files = tuple(files) if files else data.train_files
    with pytest.raises(InputError, match=f"written within an epoch .*{message}"):
        fit(data, ckpt_path=interrupted)

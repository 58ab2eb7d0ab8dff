"""A run on text: the order of its batches, resumed in another way, and on two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from made_sentences import CountTokens, assert_same, fit, make_pairs, make_text, write_pairs
from nmlightning.errors import InputError
from nmlightning.translation.tokenizer import JointBPE
from trainers import SaveAt


def test_text_runs_are_reproducible_and_epochs_differ(tmp_path: Path) -> None:
    first, again = fit(make_text(tmp_path)), fit(make_text(tmp_path))
    assert_same(first.seen, again.seen)
    other = fit(make_text(tmp_path), seed=2)
    assert len(other.seen) == len(first.seen) == 3 * first.epochs.count(0), "as many in each"
    for step, tokens in other.seen.items():
        assert not torch.equal(tokens, first.seen[step])


def test_text_validation_reads_every_reference(tmp_path: Path) -> None:
    model = fit(make_text(tmp_path), max_epochs=1, num_sanity_val_steps=0)
    assert sorted(model.references) == sorted(pair.target for pair in make_pairs(23, seed=1))


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
    for tokens, theirs in zip(resumed.seen.values(), expected, strict=True):
        assert torch.equal(tokens, theirs)


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


def test_text_run_refuses_another_number_of_processes(interrupted: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(interrupted, weights_only=True)
    checkpoint["ParallelText"]["processes"] = 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="with 2 processes, and this run has 1"):
        fit(make_text(tmp_path), ckpt_path=tmp_path / "two.ckpt")


def test_text_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        model = fit(make_text(tmp_path), overfit_batches=2)
    assert model.epochs == [0, 0, 1, 1, 2, 2]
    for step in range(2, 6):
        assert torch.equal(model.seen[step], model.seen[step % 2])


class SaveSeen(pl.Callback):
    """Leaves what each rank saw in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CountTokens)
        torch.save(pl_module.seen, self.folder / f"seen.{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.usefixtures("_forks")
def test_text_batches_are_shared_by_two_processes(tmp_path: Path) -> None:
    whole = fit(make_text(tmp_path), max_epochs=1).seen
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1}
    fit(make_text(tmp_path), callbacks=[SaveSeen(tmp_path)], **options)
    for rank in range(2):
        seen = torch.load(tmp_path / f"seen.{rank}.pt", weights_only=True)
        mine = list(whole.values())[rank : len(whole) // 2 * 2 : 2]
        assert_same(seen, dict(enumerate(mine)))

"""Any pair of text files, one sentence a line."""

from collections.abc import Sequence
from pathlib import Path

from nmlightning.datamodules.translation_data import TranslationData
from nmlightning.errors import InputError
from nmlightning.text.encoded_pairs import TooLong
from nmlightning.text.parallel_files import ParallelFiles
from nmlightning.text.sentence_pair import SentencePair


class ParallelText(TranslationData):
    """Pairs of UTF-8 files, plain or gzipped: each line of one is translated in that of the other.

    One joint byte-pair tokenizer (`JointBPE`) is trained on the training files or loaded. The
    training pairs are encoded once; they and the tokenizer are kept below `root`, and mapped into
    memory. Pairs with an empty side and pairs that are too long are left out of training, with one
    warning that counts them. In evaluation every line counts; only of a source longer than
    `max_length` the rest is not read.

    Batches are `TranslationBatch`es of pairs of about one length, bounded by their tokens. The
    order follows from `seed_everything` and the epoch, also after a resume (see
    `ShuffledBatches`).

    Args:
        train: the file of the sentences, and that of their translations.
        val: the same, to validate with.
        test: the same, to test and predict with; None tests with `val`.
        vocab_size: entries of the tokenizer, special ones and the 256 bytes included.
        tokenizer: the file of a tokenizer, or a checkpoint, which holds one; none is then trained.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch, on each
            process.
        max_length: tokens of a sentence, without its begin and end.
        too_long: `drop` training pairs with more tokens on a side, or `truncate` these to
            `max_length`.
        root: folder in which `translation` keeps the tokenizer and the encoded pairs.

    Raises:
        InputError: without the extra `text`; for files that are absent, damaged, not UTF-8, empty
            or of unequal length; for a tokenizer that is none; if a sentence does not fit in a
            batch.
    """

    def __init__(
        self,
        train: list[str],
        val: list[str],
        test: list[str] | None = None,
        *,
        vocab_size: int = 32000,
        tokenizer: str | None = None,
        tokens_a_batch: int = 25000,
        max_length: int = 256,
        too_long: TooLong = "drop",
        root: str = "data",
    ) -> None:
        folder = Path(root).expanduser().absolute() / "translation"
        super().__init__(folder, vocab_size, tokenizer, tokens_a_batch, max_length, too_long)
        self.train_files = _check_pair("train", train)
        self.evaluation_files = {
            "validation": _check_pair("val", val),
            "test": _check_pair("test", val if test is None else test),
        }

    def training_pairs(self) -> ParallelFiles:
        return ParallelFiles(*self.train_files)

    def evaluation_pairs(self, part: str) -> Sequence[SentencePair]:
        return list(ParallelFiles(*self.evaluation_files[part]))


def _check_pair(what: str, files: Sequence[str]) -> tuple[str, str]:
    if isinstance(files, str) or len(files) != 2:
        raise InputError(
            f"{what} is two files, of sentences and of their translations, got {files!r}."
        )
    source, target = files
    return source, target

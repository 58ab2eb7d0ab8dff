"""Data modules of sentence pairs: WMT14, any parallel text, and names of numbers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from nmlightning.datamodules import training_batches
from nmlightning.errors import InputError, check_choice, check_flag, check_whole_number
from nmlightning.translation import corpus, sources
from nmlightning.translation.batches import (
    EvaluationSentences,
    ShuffledBatches,
    StreamedBatches,
    TrainingPairs,
)
from nmlightning.translation.tokenizer import SMALLEST, JointBPE


class TranslationData(training_batches.ResumableData, ABC):
    """The base of the data modules of sentence pairs; see `ParallelText` for the arguments.

    The tokenizer and the encoded training pairs are cached in `folder`; None caches nothing.
    """

    unit = "sentences"  # of a training rate
    encodes_all = True  # all training pairs, beforehand
    tokenizer: JointBPE | None = None
    train: corpus.EncodedPairs | None = None

    def __init__(
        self,
        folder: Path | None,
        vocab_size: int,
        tokenizer: str | None,
        tokens_a_batch: int,
        max_length: int,
        too_long: corpus.TooLong,
    ) -> None:
        super().__init__()
        check_choice("too_long", too_long, get_args(corpus.TooLong))
        self.folder = folder
        self.new_vocab_size = check_whole_number("vocab_size", vocab_size, SMALLEST)
        self.tokenizer_path = tokenizer
        self.limits = corpus.TrainingLimits(check_whole_number("max_length", max_length), too_long)
        self.tokens_a_batch = check_whole_number("tokens_a_batch", tokens_a_batch)
        if tokens_a_batch < max_length + 2:
            raise InputError(
                f"tokens_a_batch {tokens_a_batch} is too few for a sentence of max_length "
                f"{max_length} tokens with its begin and end: choose at least {max_length + 2}."
            )

    @abstractmethod
    def training_pairs(self) -> sources.PairSource:
        """Return the pairs to train the network and the tokenizer with."""

    @abstractmethod
    def evaluation_pairs(self, part: str) -> Sequence[sources.SentencePair]:
        """Return all pairs of `validation` or `test`."""

    @property
    def vocab_size(self) -> int:
        """The entries of the tokenizer, which `setup` finds."""
        assert self.tokenizer is not None, "setup() comes first"
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Cache the tokenizer and the encoded training pairs; Lightning calls it in one process."""
        if self.folder is not None:
            tokenizer = self._find_tokenizer()
            if self.encodes_all and (self.trainer is None or self.trainer.state.fn == "fit"):
                pairs = self.training_pairs()
                corpus.cached_pairs(self.folder, pairs, tokenizer, self.limits, check=True)

    def setup(self, stage: str | None = None) -> None:
        """Find the tokenizer and, for a fit, the training pairs."""
        if self.tokenizer is None:
            self.tokenizer = self._find_tokenizer()
        if self.encodes_all and self.train is None and stage in (None, "fit"):
            pairs = self.training_pairs()
            self.train = corpus.cached_pairs(self.folder, pairs, self.tokenizer, self.limits)
            if omitted := self.train.omitted.describe(self.limits):
                used = self.train.length
                rank_zero_warn(f"Of the training pairs {omitted}; {used} are used.")

    def _find_tokenizer(self) -> JointBPE:
        if self.tokenizer_path is not None:
            return JointBPE.load(Path(self.tokenizer_path).expanduser())
        return corpus.cached_tokenizer(self.folder, self.training_pairs(), self.new_vocab_size)

    def train_dataloader(self) -> Iterable[corpus.TranslationBatch]:
        assert self.tokenizer is not None, "setup('fit') comes first"
        assert self.train is not None, "setup('fit') comes first"
        what = (self.train, self.tokens_a_batch, self.tokenizer.digest)
        order = ShuffledBatches(*what, **self.order_options())
        return self.load(TrainingPairs(self.train, self.pins_memory), order)

    def val_dataloader(self) -> EvaluationSentences:
        return self._evaluate("validation")

    def test_dataloader(self) -> EvaluationSentences:
        return self._evaluate("test")

    def predict_dataloader(self) -> EvaluationSentences:
        return self.test_dataloader()

    def _evaluate(self, part: str) -> EvaluationSentences:
        assert self.tokenizer is not None, "setup() comes first"
        pairs = self.evaluation_pairs(part)
        encoded = corpus.encode_pairs(pairs, self.tokenizer)
        longest = self.limits.max_length
        if cut := int((encoded.source.lengths > longest).sum()):
            rank_zero_warn(
                f"Of the {part} sentences {cut} have more than {longest} tokens and are read up to "
                "there."
            )
        references, shard = [pair.target for pair in pairs], training_batches.shard_of(self.trainer)
        return EvaluationSentences(
            encoded, references, self.tokens_a_batch, longest, shard, self.pins_memory
        )


class ParallelText(TranslationData):
    """Pairs of UTF-8 files, plain or gzipped: each line of one is translated in that of the other.

    One joint byte-pair tokenizer (`JointBPE`) is trained on the training files or loaded. The
    training pairs are encoded once; they and the tokenizer are cached below `root`, and mapped into
    memory. Pairs with an empty side and pairs that are too long are left out of training, with one
    warning that counts them. In evaluation every line counts; a source is read up to `max_length`
    tokens.

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
        root: folder whose `translation` caches the tokenizer and the encoded pairs.

    Raises:
        InputError: without the extra `text`; for files that are absent, damaged, not UTF-8, empty
            or of unequal length; for a file that is not a tokenizer; if a sentence does not fit in
            a batch.
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
        too_long: corpus.TooLong = "drop",
        root: str = "data",
    ) -> None:
        folder = Path(root).expanduser().absolute() / "translation"
        super().__init__(folder, vocab_size, tokenizer, tokens_a_batch, max_length, too_long)
        self.train_files = _check_pair("train", train)
        self.evaluation_files = {
            "validation": _check_pair("val", val),
            "test": _check_pair("test", val if test is None else test),
        }

    def training_pairs(self) -> sources.ParallelFiles:
        return sources.ParallelFiles(*self.train_files)

    def evaluation_pairs(self, part: str) -> Sequence[sources.SentencePair]:
        return list(sources.ParallelFiles(*self.evaluation_files[part]))


def _check_pair(what: str, files: Sequence[str]) -> tuple[str, str]:
    if isinstance(files, str) or len(files) != 2:
        raise InputError(
            f"{what} is two files, of sentences and of their translations, got {files!r}."
        )
    source, target = files
    return source, target


LANGUAGES = ("de", "en")  # the configuration is called de-en
TOKENIZER_PAIRS = 1_000_000  # of a stream, that a tokenizer is trained on


class WMT14(TranslationData):
    """WMT14, German to English, of Hugging Face's `datasets`: 4.5 million pairs to train with.

    Validation is newstest2013 with 3,000 pairs, test and prediction newstest2014 with 3,003. For
    tokenizer, encoding and batches see `ParallelText`.

    Not streamed, the data set is downloaded to `root/wmt14` and encoded in `root/translation` once.
    Streamed, nothing is written but the tokenizer, trained on the first million pairs: batches
    begin at once, but pairs are mixed only within pools of the stream's order, and every process
    reads the whole stream (see `StreamedBatches`).

    Args:
        streaming: whether to read training pairs as they arrive.
        dataset: the name on the Hub, or a folder with a copy of it.
        pool: pairs that are sorted into batches together when streaming.
        vocab_size: entries of the tokenizer, special ones and the 256 bytes included.
        tokenizer: the file of a tokenizer, or a checkpoint, which holds one; none is then trained.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch, on each
            process.
        max_length: tokens of a sentence, without its begin and end.
        too_long: `drop` training pairs with more tokens on a side, or `truncate` these to
            `max_length`.
        root: folder for what is downloaded and encoded.

    Raises:
        InputError: without the extra `text`; if the data set is neither at hand nor reachable; for
            a file that is not a tokenizer; if a sentence does not fit in a batch.
    """

    def __init__(
        self,
        *,
        streaming: bool = False,
        dataset: str = "wmt/wmt14",
        pool: int = 100_000,
        vocab_size: int = 32000,
        tokenizer: str | None = None,
        tokens_a_batch: int = 25000,
        max_length: int = 256,
        too_long: corpus.TooLong = "drop",
        root: str = "data",
    ) -> None:
        place = Path(root).expanduser().absolute()
        folder = place / "translation"
        super().__init__(folder, vocab_size, tokenizer, tokens_a_batch, max_length, too_long)
        self.streaming = check_flag("streaming", streaming)
        self.encodes_all = not streaming
        self.pool = check_whole_number("pool", pool)
        self.dataset = dataset
        self.downloads = place / "wmt14"

    def training_pairs(self) -> sources.PairSource:
        if self.streaming:  # only the tokenizer is trained on them
            return sources.StreamedPairs(self._open("train"), LANGUAGES, TOKENIZER_PAIRS)
        return sources.StoredPairs(self._open("train"), LANGUAGES)

    def evaluation_pairs(self, part: str) -> Sequence[sources.SentencePair]:
        return list(sources.StoredPairs(self._open(part), LANGUAGES))

    def train_dataloader(self) -> Iterable[corpus.TranslationBatch]:
        if not self.streaming:
            return super().train_dataloader()
        assert self.tokenizer is not None, "setup('fit') comes first"
        batches = StreamedBatches(
            sources.StreamedPairs(self._open("train"), LANGUAGES),
            self.tokenizer,
            self.limits,
            self.tokens_a_batch,
            self.pool,
            **self.order_options(),
            pin_memory=self.pins_memory,
            batches_done=self.batches_done,
            interrupted=self.interrupted,
        )
        # Lightning reads a batch of a loader without a length before it says which epoch comes.
        batches.set_epoch(training_batches.find_epoch(self.trainer, self.interrupted))
        self.sampler = batches
        return batches

    def _open(self, split: str) -> Any:
        return sources.open_split(
            self.dataset, LANGUAGES, split, self.downloads, streaming=self.streaming
        )


HELD_OUT = 500  # numbers to validate with, and to test with
VOCAB_SIZE = 400
LONGEST = 64  # tokens; a name has less than half of that


class NumberNames(TranslationData):
    """The names of numbers up to a million, German to English, generated by `num2words`.

    Einundzwanzig is twenty-one: the order is reversed, and German joins the words. Training has the
    numbers from 0 to 99 and `pairs` others, validation and test 500 each that are in no other part;
    as many of 3, 4, 5 and 6 digits. Always the same.

    The joint tokenizer is trained when it is set up, and nothing is written. For the order of
    batches see `ShuffledBatches`.

    Args:
        pairs: numbers to train with, without those below 100.
        vocab_size: entries of the tokenizer, special ones and the 256 bytes included.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch, on each
            process.

    Raises:
        InputError: without the extra `text`; for less than one pair or too small a vocabulary.
    """

    def __init__(
        self, *, pairs: int = 6_000, vocab_size: int = VOCAB_SIZE, tokens_a_batch: int = 1024
    ) -> None:
        super().__init__(None, vocab_size, None, tokens_a_batch, LONGEST, "drop")
        training, *held_out = sources.split_numbers(check_whole_number("pairs", pairs), HELD_OUT)
        self._training = sources.NamedNumbers(training)
        self._held_out = dict(
            zip(("validation", "test"), map(sources.NamedNumbers, held_out), strict=True)
        )

    def training_pairs(self) -> sources.NamedNumbers:
        return self._training

    def evaluation_pairs(self, part: str) -> Sequence[sources.SentencePair]:
        return list(self._held_out[part])

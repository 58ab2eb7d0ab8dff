"""What the data modules of sentence pairs share: their tokenizer, their batches, their checks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from nmlightning.datamodules.process_shard import shard_of
from nmlightning.datamodules.resumable_data import ResumableData
from nmlightning.datamodules.sentence_batches import (
    EvaluationSentences,
    ShuffledBatches,
    TrainingPairs,
)
from nmlightning.datamodules.training_batches import (
    TrainingBatches,
    count_batches_done,
    order_seed,
)
from nmlightning.errors import InputError, check_choice, check_whole_number
from nmlightning.text.encoded_pairs import EncodedPairs, TooLong, TrainingLimits, encode_pairs
from nmlightning.text.kept_corpus import keep_pairs, keep_tokenizer
from nmlightning.text.sentence_pair import PairSource, SentencePair
from nmlightning.text.tokenizer import SMALLEST, JointBPE
from nmlightning.text.translation_batch import TranslationBatch


class TranslationData(ResumableData, ABC):
    """Sentence pairs to train with, to validate with and, if there are others, to test with.

    Args:
        folder: keeps the tokenizer and the encoded training pairs; None makes them in memory.
        vocab_size: entries of a tokenizer that is trained.
        tokenizer: the file of one that is not, or a checkpoint.
        tokens_a_batch: at most so many tokens, padding included, on either side of a batch.
        max_length: tokens of a sentence, without BOS and EOS.
        too_long: what becomes of training pairs with more (see `TrainingLimits`).

    Attributes:
        unit: what a training rate is counted in.
        encodes_all: whether all training pairs are encoded beforehand.
        tokenizer: from `setup` on.
        train: the encoded training pairs, from `setup("fit")` on.
    """

    unit = "sentences"
    encodes_all = True
    tokenizer: JointBPE | None = None
    train: EncodedPairs | None = None

    def __init__(
        self,
        folder: Path | None,
        vocab_size: int,
        tokenizer: str | None,
        tokens_a_batch: int,
        max_length: int,
        too_long: TooLong,
    ) -> None:
        super().__init__()
        check_choice("too_long", too_long, get_args(TooLong))
        self.folder = folder
        self.new_vocab_size = check_whole_number("vocab_size", vocab_size, SMALLEST)
        self.tokenizer_path = tokenizer
        self.limits = TrainingLimits(check_whole_number("max_length", max_length), too_long)
        self.tokens_a_batch = check_whole_number("tokens_a_batch", tokens_a_batch)
        if tokens_a_batch < max_length + 2:
            raise InputError(
                f"tokens_a_batch {tokens_a_batch} is too few for a sentence of max_length "
                f"{max_length} tokens with its begin and end: choose at least {max_length + 2}."
            )

    @abstractmethod
    def training_pairs(self) -> PairSource:
        """Return what is trained on, and what the tokenizer is trained on."""

    @abstractmethod
    def evaluation_pairs(self, part: str) -> Sequence[SentencePair]:
        """Return all pairs of `validation` or `test`."""

    @property
    def vocab_size(self) -> int:
        """The entries of the tokenizer, which `setup` finds."""
        assert self.tokenizer is not None, "setup() comes first"
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the training pairs, where they are not kept already.

        Lightning calls this in one process.
        """
        if self.folder is not None:
            tokenizer = self._find_tokenizer()
            if self.encodes_all and (self.trainer is None or self.trainer.state.fn == "fit"):
                pairs = self.training_pairs()
                keep_pairs(self.folder, pairs, tokenizer, self.limits, check=True)

    def setup(self, stage: str | None = None) -> None:
        """Find the tokenizer and, for a fit, the training pairs."""
        if self.tokenizer is None:
            self.tokenizer = self._find_tokenizer()
        if self.encodes_all and self.train is None and stage in (None, "fit"):
            pairs = self.training_pairs()
            self.train = keep_pairs(self.folder, pairs, self.tokenizer, self.limits)
            if told := self.train.omitted.describe(self.limits):
                used = self.train.length
                rank_zero_warn(f"Of the training pairs {told}; {used} are used.")

    def _find_tokenizer(self) -> JointBPE:
        if self.tokenizer_path is not None:
            return JointBPE.load(Path(self.tokenizer_path).expanduser())
        return keep_tokenizer(self.folder, self.training_pairs(), self.new_vocab_size)

    def train_dataloader(self) -> Iterable[TranslationBatch]:
        assert self.tokenizer is not None, "setup('fit') comes first"
        assert self.train is not None, "setup('fit') comes first"
        trainer = self.trainer
        sampler = ShuffledBatches(
            self.train,
            self.tokens_a_batch,
            self.tokenizer.digest,
            seed=order_seed(trainer, self.interrupted),
            shard=shard_of(trainer),
            shuffle=not getattr(trainer, "overfit_batches", 0),
        )
        self.sampler = sampler
        pairs = TrainingPairs(self.train, self.pins_memory)
        return TrainingBatches(pairs, sampler, count_batches_done(trainer), self.interrupted)

    def val_dataloader(self) -> EvaluationSentences:
        return self._evaluate("validation")

    def test_dataloader(self) -> EvaluationSentences:
        return self._evaluate("test")

    def predict_dataloader(self) -> EvaluationSentences:
        return self.test_dataloader()

    def _evaluate(self, part: str) -> EvaluationSentences:
        assert self.tokenizer is not None, "setup() comes first"
        pairs = self.evaluation_pairs(part)
        encoded = encode_pairs(pairs, self.tokenizer)
        cut = int((encoded.source.lengths > self.limits.max_length).sum())
        if cut:
            rank_zero_warn(
                f"Of the {part} sentences {cut} have more than {self.limits.max_length} tokens and "
                "are read up to there."
            )
        return EvaluationSentences(
            encoded,
            [pair.target for pair in pairs],
            self.tokens_a_batch,
            self.limits.max_length,
            shard_of(self.trainer),
            self.pins_memory,
        )

    @property
    def pins_memory(self) -> bool:
        """Whether batches are handed out in page-locked memory, for a CUDA device."""
        return bool(self.trainer and self.trainer.strategy.root_device.type == "cuda")

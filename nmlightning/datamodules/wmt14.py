"""WMT14 German to English (Bojar et al. 2014, https://aclanthology.org/W14-3302)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nmlightning.datamodules.hub_pairs import StoredPairs, StreamedPairs, open_split
from nmlightning.datamodules.process_shard import shard_of
from nmlightning.datamodules.streamed_batches import StreamedBatches
from nmlightning.datamodules.training_batches import (
    count_batches_done,
    find_epoch,
    order_seed,
)
from nmlightning.datamodules.translation_data import TranslationData
from nmlightning.errors import check_flag, check_whole_number
from nmlightning.text.encoded_pairs import TooLong
from nmlightning.text.sentence_pair import PairSource, SentencePair
from nmlightning.text.translation_batch import TranslationBatch

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
            a tokenizer that is none; if a sentence does not fit in a batch.
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
        too_long: TooLong = "drop",
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

    def training_pairs(self) -> PairSource:
        if self.streaming:  # only the tokenizer is trained on them
            return StreamedPairs(self._open("train"), LANGUAGES, TOKENIZER_PAIRS)
        return StoredPairs(self._open("train"), LANGUAGES)

    def evaluation_pairs(self, part: str) -> Sequence[SentencePair]:
        return list(StoredPairs(self._open(part), LANGUAGES))

    def train_dataloader(self) -> Iterable[TranslationBatch]:
        if not self.streaming:
            return super().train_dataloader()
        assert self.tokenizer is not None, "setup('fit') comes first"
        trainer = self.trainer
        batches = StreamedBatches(
            StreamedPairs(self._open("train"), LANGUAGES),
            self.tokenizer,
            self.limits,
            self.tokens_a_batch,
            self.pool,
            seed=order_seed(trainer, self.interrupted),
            shard=shard_of(trainer),
            shuffle=not getattr(trainer, "overfit_batches", 0),
            pin_memory=self.pins_memory,
            batches_done=count_batches_done(trainer),
            interrupted=self.interrupted,
        )
        # Lightning reads a batch of a loader without a length before it says which epoch comes.
        batches.set_epoch(find_epoch(trainer, self.interrupted))
        self.sampler = batches
        return batches

    def _open(self, split: str) -> Any:
        return open_split(self.dataset, LANGUAGES, split, self.downloads, streaming=self.streaming)

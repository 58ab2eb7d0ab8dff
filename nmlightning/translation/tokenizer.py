"""Byte-level byte-pair encoding of both languages together."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from nmlightning.atomic_file import replace_file
from nmlightning.errors import InputError, check_whole_number
from nmlightning.translation.sources import import_text_package

PAD, BOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
BYTES = 256
SMALLEST = len(SPECIAL_TOKENS) + BYTES
CHECKPOINT_KEY = "tokenizer"
KIND = ("BPE", "ByteLevel", "ByteLevel")  # model, what comes before it, and the decoder


class JointBPE:
    """A vocabulary of byte-pair encodings (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909).

    One for source and target, so that their embeddings can be shared. The first entries are
    `SPECIAL_TOKENS`, the next the 256 bytes, so every text has tokens and none is `<unk>`; the
    others are learned. Nothing is normalised but this: a sentence begins with a space, so that its
    first word has the tokens that it has elsewhere, and `decode` takes that space off. Hence
    decode(encode(x)) is x, for any x without white space at its beginning. Text that looks like a
    special token is plain text.

    The tokenizer is one of the package `tokenizers`, and so is its file.

    Examples:
        >>> bpe = JointBPE.train(["ein Haus", "a house"], vocab_size=262)
        >>> bpe.decode(bpe.encode(["ein Haus"]))
        ['ein Haus']

    Raises:
        InputError: without the package, or of a text that is no such tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.encode_special_tokens = True  # as plain text; the package does not save it
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 32000) -> "JointBPE":
        """Learn at most `vocab_size` entries from sentences; the same from the same sentences.

        There are fewer where the texts have no more pairs to join.
        """
        check_whole_number("vocab_size", vocab_size, SMALLEST)
        tokenizers = import_text_package("tokenizers")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def from_json(cls, text: str, name: str = "the tokenizer") -> "JointBPE":
        """Return the tokenizer that `to_json` wrote; errors call it by `name`."""
        tokenizers = import_text_package("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing more special
            raise InputError(
                f"{name} is not a tokenizer ({error}): give a file that JointBPE.save wrote."
            ) from error
        content = json.loads(text)
        parts = (content[part] or {} for part in ("model", "pre_tokenizer", "decoder"))
        if tuple(part.get("type") for part in parts) != KIND or content["normalizer"]:
            raise InputError(
                f"{name} is a tokenizer of another kind, not of byte-level byte-pair encodings: "
                "give a file that JointBPE.save wrote."
            )
        first = tuple(map(tokenizer.id_to_token, range(len(SPECIAL_TOKENS))))
        if first != SPECIAL_TOKENS:
            raise InputError(
                f"{name} begins with {' '.join(map(str, first))} and not with "
                f"{' '.join(SPECIAL_TOKENS)}: give a file that JointBPE.save wrote."
            )
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "JointBPE":
        """Return the tokenizer in a file that `save` wrote, or in a checkpoint of a translator."""
        try:
            if not zipfile.is_zipfile(path):
                return cls.from_json(Path(path).read_text("utf-8"), str(path))
            import torch  # which is not needed to encode a text

            checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except (OSError, UnicodeDecodeError) as error:
            failure = f"the tokenizer {path} cannot be read ({error})"
            raise InputError(f"{failure}: give a file that JointBPE.save wrote.") from error
        if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
            raise InputError(f"the checkpoint {path} has no tokenizer: it is from another task.")
        return cls.from_json(str(checkpoint[CHECKPOINT_KEY]), str(path))

    def save(self, path: str | Path) -> None:
        """Write one JSON file, at once or not at all."""
        with replace_file(path) as file:
            file.write(self.to_json().encode())

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        """The number of entries, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that differ if a text might be encoded otherwise."""
        model = json.loads(self.to_json())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        content = json.dumps([sorted(model["vocab"].items()), merges])
        return sha256(content.encode()).hexdigest()[:32]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without BOS and EOS."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of tokens; special tokens, PAD too, are left out.

        Bytes that are no UTF-8, as a model may put them together, become U+FFFD.
        """
        texts = self._tokenizer.decode_batch(tokens, skip_special_tokens=True)
        return [text.removeprefix(" ") for text in texts]

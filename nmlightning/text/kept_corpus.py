"""A tokenizer and encoded training pairs, made once and kept in files.

The name of a file follows from the pairs and from every option that matters, so other data or
options make another file. What is damaged is made anew. Without a folder all is made in memory.
"""

from hashlib import sha256
from pathlib import Path

from nmlightning.errors import InputError
from nmlightning.text.encoded_pairs import EncodedPairs, TrainingLimits, encode_pairs
from nmlightning.text.pair_file import read_pairs, write_pairs
from nmlightning.text.sentence_pair import PairSource
from nmlightning.text.tokenizer import JointBPE


def keep_tokenizer(folder: Path | None, pairs: PairSource, vocab_size: int) -> JointBPE:
    """Return the joint tokenizer of both sides of the pairs, trained where it is not kept."""
    if folder is None:
        return _train_tokenizer(pairs, vocab_size)
    path = _name(folder, "tokenizer", ".json", pairs.digest, vocab_size)
    if path.is_file():
        try:
            return JointBPE.load(path)
        except InputError:  # damaged
            path.unlink()
    tokenizer = _train_tokenizer(pairs, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def keep_pairs(
    folder: Path | None,
    pairs: PairSource,
    tokenizer: JointBPE,
    limits: TrainingLimits,
    *,
    check: bool = False,
) -> EncodedPairs:
    """Return the pairs that are fit to train with, encoded where they are not kept.

    Args:
        folder: where they are kept; None keeps nothing.
        pairs: all pairs.
        tokenizer: of both sides.
        limits: which are fit.
        check: read all that is kept, to know whether it is intact.

    Raises:
        InputError: if no pair is.
    """
    if folder is None:
        return _encode(pairs, tokenizer, limits)
    path = _name(folder, "pairs", ".safetensors", pairs.digest, tokenizer.digest, *limits)
    kept = read_pairs(path)
    if kept and not (check and not kept.is_intact()):
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(path, _encode(pairs, tokenizer, limits))
    written = read_pairs(path)
    assert written, f"{path} was written a moment ago"
    return written


def _train_tokenizer(pairs: PairSource, vocab_size: int) -> JointBPE:
    return JointBPE.train((sentence for pair in pairs for sentence in pair), vocab_size)


def _encode(pairs: PairSource, tokenizer: JointBPE, limits: TrainingLimits) -> EncodedPairs:
    encoded = encode_pairs(pairs, tokenizer, limits)
    if not encoded.length:
        raise InputError(
            f"no sentence pair is left to train with: {encoded.omitted.empty} have an empty side "
            f"and {encoded.omitted.too_long} more than {limits.max_length} tokens; give other data "
            "or a larger max_length."
        )
    return encoded


def _name(folder: Path, what: str, ending: str, *follows_from: object) -> Path:
    digest = sha256(repr(follows_from).encode()).hexdigest()[:16]
    return folder / f"{what}-{digest}{ending}"

"""The vocabulary of a translation task: that of its data, of its network and of its checkpoint."""

from typing import Any

from torch import nn

from nmlightning.errors import InputError
from nmlightning.text.tokenizer import CHECKPOINT_KEY, JointBPE


def check_fits(tokenizer: JointBPE, net: nn.Module) -> None:
    """Raise InputError if the network has fewer embeddings than the vocabulary has entries."""
    rows = getattr(net, "vocab_size", None)
    if rows is not None and rows < tokenizer.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries and {type(net).__name__} "
            f"embeddings for {rows:,}: set the network's vocab_size to {tokenizer.vocab_size}."
        )


def store_tokenizer(tokenizer: JointBPE | None, checkpoint: dict[str, Any]) -> None:
    """Put the tokenizer into a checkpoint, as text."""
    if tokenizer is not None:
        checkpoint[CHECKPOINT_KEY] = tokenizer.to_json()


def read_tokenizer(checkpoint: dict[str, Any], current: JointBPE | None) -> JointBPE | None:
    """Return the tokenizer of a checkpoint, or the current one where it has none.

    Raises:
        InputError: the current one, which is that of the data, is another.
    """
    if CHECKPOINT_KEY not in checkpoint:
        return current
    stored = JointBPE.from_json(checkpoint[CHECKPOINT_KEY])
    if current is not None and current.digest != stored.digest:
        raise InputError(
            f"the checkpoint was trained with another vocabulary ({stored.vocab_size:,} entries, "
            f"{stored.digest}) than the data's ({current.vocab_size:,} entries, {current.digest}): "
            "set data.tokenizer to the checkpoint, which holds its own."
        )
    return stored

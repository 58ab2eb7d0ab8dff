"""Translating by the likeliest token at each step."""

import torch
from torch import Tensor

from nmlightning.models.sequence_model import (
    SequenceModel,
    State,
    longest_translations,
    rule_out,
)
from nmlightning.text.special_tokens import BOS, EOS


@torch.no_grad()
def greedy_search(
    net: SequenceModel[State], source: Tensor, *, extra_length: int = 50
) -> list[list[int]]:
    """Translate each sentence by the likeliest token at each step, until that is EOS.

    A sentence leaves the batch when it is finished. PAD and BOS are never written.

    Args:
        net: a sequence model, in evaluation mode.
        source: (N, S) int64, padded at the end.
        extra_length: how many more tokens than the source, its EOS counted, a translation may have;
            there it is cut off.

    Returns:
        the tokens of each translation, without BOS and EOS.

    Raises:
        InputError: see `longest_translations`.

    Example:
        >>> from nmlightning.models import Transformer
        >>> net = Transformer(50, width=32, hidden=64, heads=2).eval()
        >>> len(greedy_search(net, torch.tensor([[7, 8, 2], [9, 2, 0]])))
        2
    """
    limits = longest_translations(net, source, extra_length)
    found: list[list[int]] = [[] for _ in source]
    if not found:
        return found
    state = net.begin(source)
    sentences = torch.arange(len(source), device=source.device)
    tokens = torch.full_like(sentences, BOS)
    for length in range(1, int(limits.max()) + 1):
        tokens = rule_out(net.next_logits(tokens, state)).argmax(1)
        for sentence, token in zip(sentences.tolist(), tokens.tolist(), strict=True):
            if token != EOS:
                found[sentence].append(token)
        rows = ((tokens != EOS) & (length < limits[sentences])).nonzero().flatten()
        if not len(rows):
            break
        if len(rows) < len(tokens):
            state.select(rows)
            sentences, tokens = sentences[rows], tokens[rows]
    return found

"""Cross-entropy over the tokens of padded sentences."""

from typing import NamedTuple

import torch
from torch import Tensor

from nmlightning.text.special_tokens import PAD


class TokenLoss(NamedTuple):
    """Scalars of a batch, in float32.

    Attributes:
        loss: to descend on: the mean over the tokens, smoothed.
        negative_log_likelihood: −Σ log p(target), in nats, without smoothing or gradient.
        tokens: how many there are, without padding.
    """

    loss: Tensor
    negative_log_likelihood: Tensor
    tokens: Tensor


def token_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
    """Return the cross-entropy with smoothed labels, ε shared by all entries of the vocabulary.

        loss = mean over tokens of  −(1 − ε) log p(target) − ε/V Σ_v log p(v)

    Args:
        logits: (N, T, V), whatever their dtype.
        targets: (N, T); `PAD` counts for nothing.
        label_smoothing: ε.

    Source: Szegedy et al. (2016), section 7, https://arxiv.org/abs/1512.00567.
    """
    is_token = targets != PAD
    tokens = is_token.sum()
    log_p = torch.log_softmax(logits, dim=2, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_targets = log_p.gather(2, targets.unsqueeze(2)).squeeze(2).masked_fill(~is_token, 0.0)
    likelihood = of_targets.sum()
    loss = -(1 - label_smoothing) * likelihood
    if label_smoothing:
        of_all = log_p.sum(2).masked_fill(~is_token, 0.0).sum()
        loss = loss - label_smoothing / logits.shape[2] * of_all
    return TokenLoss(loss / tokens, -likelihood.detach(), tokens)

"""The metrics of a translator: token loss, perplexity, BLEU, and means since the last logging."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore

from nmlightning.tasks.numerics import apply_exactly, exact_zero
from nmlightning.translation.sources import import_text_package
from nmlightning.translation.tokenizer import PAD


class Perplexity(Metric):
    """exp(−Σ log p(target) / units), over all batches and all processes.

    Units are subwords, or words, whose perplexity does not depend on how words are split and so
    compares vocabularies. Sums are kept in float32, also in a module that is half.

    Examples:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(6.0), torch.tensor(3))
        >>> metric.compute()
        tensor(7.3891)
    """

    full_state_update = False
    negative_log_likelihood: Tensor
    units: Tensor
    _apply = apply_exactly

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("negative_log_likelihood", exact_zero(), dist_reduce_fx="sum")
        self.add_state("units", exact_zero(), dist_reduce_fx="sum")

    def update(self, negative_log_likelihood: Tensor, units: Tensor) -> None:
        """Add −Σ log p of a batch, in nats, and the number of its units; both scalars."""
        self.negative_log_likelihood += negative_log_likelihood
        self.units += units

    def compute(self) -> Tensor:
        """Return the perplexity; NaN without units."""
        return (self.negative_log_likelihood / self.units).exp()


class BLEU(SacreBLEUScore):
    """torchmetrics', which counts words and matches in float32 also in a module that is half."""

    _apply = apply_exactly


class TokenLoss(NamedTuple):
    """Scalars of a batch, in float32."""

    loss: Tensor  # the mean over the tokens, smoothed
    negative_log_likelihood: Tensor  # −Σ log p(target), in nats, without smoothing or gradient
    tokens: Tensor  # their number, without padding


def token_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
    """Return the cross-entropy with smoothed labels, ε shared by all entries of the vocabulary.

        loss = mean over tokens of  −(1 − ε) log p(target) − ε/V Σ_v log p(v)

    The logits are (N, T, V), of any dtype; in the targets, (N, T), `PAD` counts for nothing.

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


class TranslationMetrics(nn.Module):
    """`loss`, `ppl`, `word_ppl` and, where there are translations, `bleu` of all that is added.

    They are those of the whole corpus, over all processes: BLEU is no mean over batches. The loss
    is the cross-entropy in nats a subword, of which `ppl` is the exponential; BLEU is SacreBLEU's,
    with its tokenizer 13a and mixed case, from 0 to 100, and unsmoothed: 0 where no four words in a
    row are right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ppl = Perplexity()
        self.word_ppl = Perplexity()
        self.bleu = BLEU(tokenize="13a")

    def add(self, step: TokenLoss, words: Tensor) -> None:
        """Add the likelihood of a batch whose translations have so many words, (N,)."""
        self.ppl.update(step.negative_log_likelihood, step.tokens)
        self.word_ppl.update(step.negative_log_likelihood, words.sum())

    def add_translations(self, found: Sequence[str], references: Sequence[str]) -> None:
        """Add translations, each with its one reference, as text."""
        self.bleu.update(list(found), [[reference] for reference in references])

    @torch.inference_mode(False)
    def compute(self) -> dict[str, Tensor]:
        """Return the values by name, and reset. Every process has to call it."""
        perplexity = self.ppl.compute()
        values = {"loss": perplexity.log(), "ppl": perplexity, "word_ppl": self.word_ppl.compute()}
        if self.bleu.update_called:
            values["bleu"] = 100 * self.bleu.compute()
        for metric in (self.ppl, self.word_ppl, self.bleu):
            metric.reset()
        return values


Translation = tuple[str, str]  # the output, and the reference


def published_bleu(translations: Sequence[Translation]) -> str:
    """Return `BLEU 27.31 (nrefs:1|case:mixed|…)` of the detokenized translations of all processes.

    Source: Post (2018), https://aclanthology.org/W18-6319.
    """
    sacrebleu = import_text_package("sacrebleu")
    parts: list[Sequence[Translation]] = [translations]
    if distributed.is_available() and distributed.is_initialized():
        parts *= distributed.get_world_size()
        distributed.all_gather_object(parts, list(translations))
    found, references = zip(*(pair for part in parts for pair in part), strict=True)
    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(list(found), [list(references)]).score
    return f"BLEU {score:.2f} ({bleu.get_signature()})"


class TrainingWindow:
    """Means over the batches since the last logging: sums on the device, and a clock."""

    _sums: Tensor | None = None  # loss, −log p, targets, tokens on both sides, batches
    _seconds = 0.0
    _running_since: float | None = None

    def resume(self) -> None:
        if self._running_since is None:
            self._running_since = time.monotonic()

    def pause(self) -> None:
        """Stop the clock, before anything but training."""
        if self._running_since is not None:
            self._seconds += time.monotonic() - self._running_since
            self._running_since = None

    def add(self, batch: TokenLoss, tokens: Tensor) -> None:
        """Add a batch, and the number of tokens of its sentences on both sides."""
        loss, one = batch.loss.detach(), torch.ones_like(batch.loss)
        counts = (batch.tokens.float(), tokens.float(), one)
        sums = torch.stack((loss, batch.negative_log_likelihood, *counts))
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, gather: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return `loss`, `ppl` and `tokens_per_s` of the batches; it waits for the device once."""
        assert self._sums is not None, "add comes first"
        of_processes = gather(self._sums).view(-1, len(self._sums))
        loss, likelihood, targets, tokens, batches = of_processes.sum(0).tolist()
        self.pause()
        self.resume()
        return {
            "loss": loss / batches,
            "ppl": float(torch.tensor(likelihood / targets).exp()),
            "tokens_per_s": tokens / self._seconds if self._seconds else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        sums, self._seconds = state.get("sums"), state.get("seconds", 0.0)
        self._sums = None if sums is None else sums.to(device)

    def clear(self) -> None:
        self._sums, self._seconds = None, 0.0

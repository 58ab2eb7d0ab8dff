"""How well a corpus is translated: perplexities and BLEU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.text import SacreBLEUScore

from nmlightning.tasks.perplexity import Perplexity
from nmlightning.tasks.token_loss import TokenLoss


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
        self.bleu = SacreBLEUScore(tokenize="13a")

    def add(self, step: TokenLoss, words: Tensor) -> None:
        """Add the likelihood of a batch whose translations have so many words, (N,)."""
        self.ppl.update(step.negative_log_likelihood, step.tokens)
        self.word_ppl.update(step.negative_log_likelihood, words.sum())

    def add_translations(self, found: Sequence[str], references: Sequence[str]) -> None:
        """Add translations, each with its one reference, as text."""
        self.bleu.update(list(found), [[reference] for reference in references])

    @torch.inference_mode(False)
    def compute(self) -> dict[str, Tensor]:
        """Return the values by name, and begin anew. Every process has to ask."""
        perplexity = self.ppl.compute()
        values = {"loss": perplexity.log(), "ppl": perplexity, "word_ppl": self.word_ppl.compute()}
        if self.bleu.update_called:
            values["bleu"] = 100 * self.bleu.compute()
        for metric in (self.ppl, self.word_ppl, self.bleu):
            metric.reset()
        return values

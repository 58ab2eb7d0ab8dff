"""Perplexity and BLEU of a corpus: the definition, sacrebleu itself, and batches of any size."""

import math

import pytest
import sacrebleu
import torch

from nmlightning.translation.metrics import (
    Perplexity,
    TokenLoss,
    TranslationMetrics,
    published_bleu,
)

REFERENCES = [
    "Two young, White males are outside near many bushes.",
    "Several men in hard hats are operating a giant pulley system.",
    "A little girl climbing into a wooden playhouse.",
    'He said: "It costs $3.50 – not £2,000!"',
]
FOUND = [
    "Two young white males are outdoors near many bushes.",
    "Several men in hard hats operate a giant pulley system.",
    "A little girl is climbing into a wooden playhouse.",
    'He says: "It costs $3.50, not £2,000!"',
]


def step(negative_log_likelihood: float, tokens: int) -> TokenLoss:
    return TokenLoss(torch.tensor(0.0), torch.tensor(negative_log_likelihood), torch.tensor(tokens))


def test_perplexities_are_of_the_corpus_not_means_over_batches() -> None:
    metrics = TranslationMetrics()
    metrics.add(step(30.0, 10), torch.tensor([3, 2]))
    metrics.add(step(10.0, 40), torch.tensor([15]))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {"loss": 40 / 50, "ppl": math.exp(40 / 50), "word_ppl": math.exp(40 / 20)}
    )


def test_bleu_is_sacrebleus_whatever_the_batches() -> None:
    metrics = TranslationMetrics()
    metrics.add(step(1.0, 1), torch.tensor([1]))
    metrics.add_translations(FOUND[:1], REFERENCES[:1])
    metrics.add_translations(FOUND[1:], REFERENCES[1:])
    expected = sacrebleu.corpus_bleu(FOUND, [REFERENCES])
    assert 0 < expected.score < 100
    assert metrics.compute()["bleu"].item() == pytest.approx(expected.score, rel=1e-5)


def test_begins_anew_after_it_was_computed() -> None:
    metrics = TranslationMetrics()
    metrics.add(step(1.0, 1), torch.tensor([1]))
    metrics.add_translations(FOUND, REFERENCES)
    assert "bleu" in metrics.compute()
    metrics.add(step(5.0, 1), torch.tensor([1]))
    values = metrics.compute()
    assert set(values) == {"loss", "ppl", "word_ppl"}
    assert values["loss"].item() == pytest.approx(5.0)


def test_the_published_bleu_has_sacrebleus_figure_and_signature() -> None:
    text = published_bleu(list(zip(FOUND, REFERENCES, strict=True)))
    score = sacrebleu.corpus_bleu(FOUND, [REFERENCES]).score
    assert text.startswith(f"BLEU {score:.2f} (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert f"version:{sacrebleu.__version__}" in text


def test_perplexity_of_nothing_is_no_number() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert Perplexity().compute().isnan()

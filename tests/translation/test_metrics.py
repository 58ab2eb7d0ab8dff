"""Token loss against torch's cross-entropy, metrics, TrainingWindow.

That perplexity and BLEU are those of a corpus is in test_task.py.
"""

import math

import pytest
import sacrebleu
import torch
from torch.nn import functional as F

from nmlightning.translation import metrics
from nmlightning.translation.metrics import (
    Perplexity,
    TokenLoss,
    TrainingWindow,
    TranslationMetrics,
    published_bleu,
    token_loss,
)
from nmlightning.translation.tokenizer import PAD


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = 3 * torch.randn(4, 7, 11, dtype=dtype)
    targets = torch.randint(1, 11, (4, 7))
    targets[0, 3:] = targets[2, 5:] = PAD
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_token_loss_equals_torchs_cross_entropy(smoothing: float) -> None:
    """The likelihood is not smoothed, and detached."""
    logits, targets = draw()
    step = token_loss(logits, targets, smoothing)
    flat, options = (logits.flatten(0, 1), targets.flatten()), {"ignore_index": PAD}
    theirs = F.cross_entropy(*flat, label_smoothing=smoothing, **options)
    torch.testing.assert_close(step.loss, theirs)
    (grad,) = torch.autograd.grad(step.loss, logits)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(grad, expected)
    assert not grad[targets == PAD].any()
    plain = F.cross_entropy(*flat, reduction="sum", **options)
    torch.testing.assert_close(step.negative_log_likelihood, plain.detach())
    assert not step.negative_log_likelihood.requires_grad
    assert step.tokens == (targets != PAD).sum() == 22


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_token_loss_sums_half_logits_in_float32(dtype: torch.dtype) -> None:
    logits, targets = draw(dtype)
    step = token_loss(logits, targets, 0.1)
    assert step.loss.dtype == step.negative_log_likelihood.dtype == torch.float32
    torch.testing.assert_close(step.loss, token_loss(logits.float(), targets, 0.1).loss)


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


def make_loss(loss: float, likelihood: float, tokens: int) -> TokenLoss:
    return TokenLoss(torch.tensor(loss), torch.tensor(likelihood), torch.tensor(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_a_half_module_count_exactly(dtype: torch.dtype) -> None:
    exact, half = TranslationMetrics(), TranslationMetrics()
    for batch in range(200):
        half.to(dtype)  # also in the middle of an epoch
        for each in (exact, half):
            each.add(make_loss(0.0, 700.1, 300), torch.tensor([280]))
            each.add_translations(FOUND[batch % 4 :], REFERENCES[batch % 4 :])
    assert half.compute() == exact.compute()
    after_reset = [v for metric in half.children() for v in metric.metric_state.values()]
    assert {value.dtype for value in after_reset} == {torch.float32}


def test_metrics_reset_after_compute() -> None:
    metrics = TranslationMetrics()
    metrics.add(make_loss(0.0, 1.0, 1), torch.tensor([1]))
    metrics.add_translations(FOUND, REFERENCES)
    assert "bleu" in metrics.compute()
    metrics.add(make_loss(0.0, 5.0, 1), torch.tensor([1]))
    values = metrics.compute()
    assert set(values) == {"loss", "ppl", "word_ppl"}
    assert values["loss"].item() == pytest.approx(5.0)


def test_published_bleu_has_score_and_signature() -> None:
    text = published_bleu(list(zip(FOUND, REFERENCES, strict=True)))
    score = sacrebleu.corpus_bleu(FOUND, [REFERENCES]).score
    assert text.startswith(f"BLEU {score:.2f} (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|")
    assert f"version:{sacrebleu.__version__}" in text


def test_perplexity_of_nothing_is_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert Perplexity().compute().isnan()


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def one_process(sums: torch.Tensor) -> torch.Tensor:
    return sums


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_training_window_reads_means_and_clears(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    window.add(make_loss(2.0, 30.0, 10), torch.tensor(25))
    window.add(make_loss(4.0, 10.0, 10), torch.tensor(15))
    clock.now = 8.0
    first = {"loss": 3.0, "ppl": math.exp(2), "tokens_per_s": 5.0}
    assert window.read(one_process) == pytest.approx(first)
    assert window.read(one_process) == pytest.approx(first)
    window.clear()
    window.add(make_loss(1.0, 0.0, 4), torch.tensor(6))
    clock.now = 11.0
    assert window.read(one_process) == pytest.approx({"loss": 1.0, "ppl": 1.0, "tokens_per_s": 2.0})


def test_training_window_pause_stops_the_clock(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    clock.now = 2.0
    window.pause()
    window.pause()
    clock.now = 100.0
    window.resume()
    window.resume()
    clock.now = 103.0
    window.add(make_loss(1.0, 0.0, 4), torch.tensor(10))
    assert window.read(one_process)["tokens_per_s"] == 2.0


def test_training_window_adds_processes(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    window.add(make_loss(2.0, 30.0, 10), torch.tensor(25))
    clock.now = 5.0
    other = torch.tensor([4.0, 10.0, 30.0, 75.0, 1.0])
    values = window.read(lambda sums: torch.stack([sums, other]))
    assert values == pytest.approx({"loss": 3.0, "ppl": math.exp(1), "tokens_per_s": 20.0})


def test_training_window_perplexity_overflows_to_infinity(clock: Clock) -> None:
    window = TrainingWindow()
    window.add(make_loss(1.0, 1e6, 1), torch.tensor(2))
    values = window.read(one_process)
    assert values["ppl"] == math.inf
    assert math.isnan(values["tokens_per_s"]), "no time went by"

"""TrainingWindow: means over its steps, and a clock that validation stops."""

import math

import pytest
import torch

from nmlightning.translation import metrics
from nmlightning.translation.metrics import TokenLoss, TrainingWindow


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def step(loss: float, likelihood: float, tokens: int) -> TokenLoss:
    return TokenLoss(torch.tensor(loss), torch.tensor(likelihood), torch.tensor(tokens))


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_reads_means_and_begins_anew(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    window.add(step(2.0, 30.0, 10), torch.tensor(25))
    window.add(step(4.0, 10.0, 10), torch.tensor(15))
    clock.now = 8.0
    first = {"loss": 3.0, "ppl": math.exp(2), "tokens_per_s": 5.0}
    assert window.read(alone) == pytest.approx(first)
    assert window.read(alone) == pytest.approx(first)
    window.clear()
    window.add(step(1.0, 0.0, 4), torch.tensor(6))
    clock.now = 11.0
    assert window.read(alone) == pytest.approx({"loss": 1.0, "ppl": 1.0, "tokens_per_s": 2.0})


def test_the_clock_stands_still_in_a_pause(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    clock.now = 2.0
    window.pause()
    window.pause()
    clock.now = 100.0
    window.resume()
    window.resume()
    clock.now = 103.0
    window.add(step(1.0, 0.0, 4), torch.tensor(10))
    assert window.read(alone)["tokens_per_s"] == 2.0


def test_processes_count_together(clock: Clock) -> None:
    window = TrainingWindow()
    window.resume()
    window.add(step(2.0, 30.0, 10), torch.tensor(25))
    clock.now = 5.0
    other = torch.tensor([4.0, 10.0, 30.0, 75.0, 1.0])
    values = window.read(lambda sums: sums + other)
    assert values == pytest.approx({"loss": 3.0, "ppl": math.exp(1), "tokens_per_s": 20.0})


def test_a_perplexity_beyond_floats_is_infinite(clock: Clock) -> None:
    window = TrainingWindow()
    window.add(step(1.0, 1e6, 1), torch.tensor(2))
    values = window.read(alone)
    assert values["ppl"] == math.inf
    assert math.isnan(values["tokens_per_s"]), "no time went by"

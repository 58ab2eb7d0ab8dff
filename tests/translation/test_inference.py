"""translate_lines: every line in its place, whatever is batched with it."""

from typing import Any

import pytest
import torch

from nmlightning.errors import InputError
from nmlightning.translation.task import LineOptions, Translator, translate_lines
from nmlightning.translation.tokenizer import EOS
from translation_runs import draw_pairs, make_text, make_trainer, make_translator, warm_up


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    """One that has learned a little."""
    torch.manual_seed(0)
    task = make_translator(lr_scheduler=warm_up)
    trainer = make_trainer(max_epochs=3, limit_val_batches=0)
    trainer.fit(task, make_text(tmp_path_factory.mktemp("text")))
    return task.eval()


def test_lines_keep_their_order(task: Translator) -> None:
    lines = [source for source, _ in draw_pairs(40, seed=3)]
    found, cut = translate_lines(task, lines)
    alone = [translate_lines(task, [line])[0][0] for line in lines]
    assert found == alone
    assert len(set(found)) > 5
    assert cut == []


@pytest.mark.parametrize("options", [LineOptions(tokens_a_batch=1), LineOptions(tokens_a_batch=9)])
def test_the_batches_change_nothing(options: LineOptions, task: Translator) -> None:
    lines = [source for source, _ in draw_pairs(15, seed=4)]
    assert translate_lines(task, lines, options) == translate_lines(task, lines)


def test_a_line_of_nothing_stays_one(task: Translator) -> None:
    done: list[int] = []
    found, _ = translate_lines(task, ["", "eins", " \t", "zwei zwei"], on_translated=done.append)
    assert (found[0], found[2]) == ("", "")
    assert found[1]
    assert sum(done) == 4
    assert translate_lines(task, []) == ([], [])


def test_what_is_too_long_is_cut_and_told(task: Translator) -> None:
    long = " ".join(["drei"] * 30)
    found, cut = translate_lines(task, ["eins", long, "vier"], LineOptions(max_length=10))
    tokens = task.tokenizer.encode([long])[0][:10]  # type: ignore[union-attr]
    assert cut == [1]
    assert found[1] == task.translate(torch.tensor([[*tokens, EOS]]))[0]


def test_beam_and_penalty_are_the_tasks_unless_given(task: Translator, monkeypatch: Any) -> None:
    given: list[dict[str, Any]] = []

    def translate(source: torch.Tensor, **options: Any) -> list[str]:
        given.append(options)
        return [""] * len(source)

    monkeypatch.setattr(task, "translate", translate)
    translate_lines(task, ["eins"])
    translate_lines(task, ["eins"], LineOptions(beam_size=7, length_penalty=0.0))
    assert given == [
        {"beam_size": None, "length_penalty": None},
        {"beam_size": 7, "length_penalty": 0.0},
    ]


def test_refuses_what_cannot_be_right() -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        translate_lines(make_translator(), ["eins"])
    with pytest.raises(InputError, match="tokens_a_batch must be a whole number of at least 1"):
        LineOptions(tokens_a_batch=0)
    with pytest.raises(InputError, match="max_length must be a whole number of at least 1"):
        LineOptions(max_length=0)

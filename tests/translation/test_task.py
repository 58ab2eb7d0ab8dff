"""Translator in a real Trainer: what it logs, keeps and refuses; translate_lines."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import sacrebleu
import timm.optim
import torch
from torch.nn import functional as F

from nmlightning import load_from_checkpoint
from nmlightning.callbacks import NormSwap, WeightNormSwap
from nmlightning.errors import InputError
from nmlightning.models import AttentionLSTM
from nmlightning.norms.layer_norm import L1LayerNorm
from nmlightning.optim.schedules import InverseSquareRootLR
from nmlightning.translation.task import LineOptions, Translator, translate_lines
from nmlightning.translation.tokenizer import EOS, PAD
from trainers import quiet_trainer
from translation_runs import VOCABULARY, draw_pairs, make_net, make_text, make_translator, warm_up

EVALUATED = ("loss", "ppl", "word_ppl", "bleu")


def test_translator_learns_and_logs(tmp_path: Path) -> None:
    task, data = make_translator(lr_scheduler=warm_up), make_text(tmp_path)
    (untrained,) = quiet_trainer().validate(task, data, verbose=False)
    trainer = quiet_trainer(max_epochs=4, check_val_every_n_epoch=4)
    trainer.fit(task, data)
    metrics = trainer.callback_metrics
    training = {f"train/{name}" for name in ("loss", "ppl", "tokens_per_s")}
    assert set(metrics) == training | {f"val/{name}" for name in EVALUATED}
    assert 1 < metrics["val/ppl"] < 0.02 * untrained["val/ppl"]
    assert metrics["val/ppl"] < metrics["val/word_ppl"]
    assert metrics["train/tokens_per_s"] > 0


class Losses(pl.Callback):
    """Keeps the loss of each batch, and what is logged after each."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *outputs: Any) -> None:
        self.losses.append(float(outputs[1]["loss"]))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.logged.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_translator_logs_means_of_all_batches(accumulated: int, tmp_path: Path) -> None:
    losses, batches = Losses(), 2 * accumulated
    trainer = quiet_trainer(
        losses,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulated,
        limit_train_batches=2 * batches + 1,
        limit_val_batches=0,
    )
    trainer.fit(make_translator(), make_text(tmp_path))
    scaled = [accumulated * loss for loss in losses.losses]
    first, second = (sum(scaled[i : i + batches]) / batches for i in (0, batches))
    assert losses.logged[batches - 1] == pytest.approx(first, rel=1e-5)
    assert losses.logged[-1] == pytest.approx(second, rel=1e-5)
    assert len(losses.logged) == 2 * batches


def test_translator_perplexities_are_of_all_sentences(tmp_path: Path) -> None:
    task, data = make_translator(), make_text(tmp_path)
    (found,) = quiet_trainer().validate(task, data, verbose=False)
    nats, subwords = 0.0, 0
    for batch in data.val_dataloader():
        logits = task.net(batch.source, batch.target[:, :-1]).detach()
        labels = batch.target[:, 1:]
        nats += F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum"
        ).item()
        subwords += int((labels != PAD).sum())
    words = sum(len(target.split()) + 1 for _, target in draw_pairs(30, seed=2))
    assert found["val/loss"] == pytest.approx(nats / subwords, rel=1e-5)
    assert found["val/ppl"] == pytest.approx(math.exp(nats / subwords), rel=1e-4)
    assert found["val/word_ppl"] == pytest.approx(math.exp(nats / words), rel=1e-4)


@pytest.mark.parametrize(("stage", "beam"), [("validate", 1), ("test", 3)])
def test_translator_bleu_equals_sacrebleus(stage: str, beam: int, tmp_path: Path) -> None:
    task, data = make_translator(beam_size=3, lr_scheduler=warm_up), make_text(tmp_path)
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(task, data)
    (found,) = getattr(quiet_trainer(), stage)(task, data, verbose=False)
    translations, references = [], []
    task.eval()
    for batch in data.val_dataloader():
        with torch.no_grad():
            translations += task.translate(batch.source, beam_size=beam)
        references += batch.references
    expected = sacrebleu.corpus_bleu(translations, [references], smooth_method="none").score
    name = {"validate": "val", "test": "test"}[stage]
    assert found[f"{name}/bleu"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "norms"), [(make_net, 7), (lambda: AttentionLSTM(VOCABULARY, 32, layer_norm=True), 5)]
)
def test_translator_translates_from_a_checkpoint_alone(
    make: Any, norms: int, tmp_path: Path
) -> None:
    task, data = make_translator(make()), make_text(tmp_path)
    swaps = NormSwap("l1", kinds=["layer"]), WeightNormSwap(layers=["linear", "recurrent"])
    trainer = quiet_trainer(*swaps, max_epochs=2)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = load_from_checkpoint(
        Translator, tmp_path / "last.ckpt", net=make(), optimizer=torch.optim.Adam
    )
    assert sum(isinstance(module, L1LayerNorm) for module in restored.modules()) == norms
    ours, theirs = (quiet_trainer().predict(each, data) for each in (restored, task))
    assert ours == theirs
    assert len({text for batch in ours for text in batch}) > 1


def test_translator_schedule_moves_by_step_or_epoch(tmp_path: Path) -> None:
    task = make_translator(lr_scheduler=lambda o: InverseSquareRootLR(o, 4))
    trainer = quiet_trainer(max_steps=3, max_epochs=-1, limit_val_batches=0)
    trainer.fit(task, make_text(tmp_path))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(8e-3)
    task = make_translator(lr_scheduler=lambda o: InverseSquareRootLR(o, 4), lr_interval="epoch")
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(task, make_text(tmp_path))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(8e-3 * 3 / 4)


def test_translator_exempts_norms_and_biases_from_decay() -> None:
    def adamw(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, weight_decay=0.1)

    decaying, exempt = make_translator(optimizer=adamw).configure_optimizers().param_groups
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 2 for parameter in decaying["params"])
    assert all(parameter.dim() == 1 for parameter in exempt["params"])


def test_translator_leaves_embeddings_to_muons_adamw() -> None:
    task = make_translator(optimizer=timm.optim.Muon, split="muon")
    by_muon, *others = task.configure_optimizers().param_groups
    assert {q for q in task.net.words.parameters() if q.dim() > 1} <= {*others[0]["params"]}
    assert all(parameter.dim() == 2 for parameter in by_muon["params"])
    assert [group["use_muon"] for group in (by_muon, *others)] == [True, False, False]
    assert task.hparams.split == "muon"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_translator_trains_in_precision(precision: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(precision=precision, limit_train_batches=3)
    trainer.fit(make_translator(), make_text(tmp_path))
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_translator_compiles_once_for_all_shapes(tmp_path: Path, monkeypatch: Any) -> None:
    task, calls = make_translator(compile=True), []
    monkeypatch.setattr(task.net, "compile", lambda **options: calls.append(options))
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(task, make_text(tmp_path))
    trainer.validate(task, make_text(tmp_path), verbose=False)
    assert calls == [{"dynamic": True}]


def test_translator_refuses_too_large_a_vocabulary(tmp_path: Path) -> None:
    task = make_translator(make_net(vocab_size=VOCABULARY - 1))
    with pytest.raises(InputError, match=f"has {VOCABULARY} entries and Transformer embeddings"):
        quiet_trainer().fit(task, make_text(tmp_path))


def test_translator_refuses_another_vocabulary(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(make_translator(), make_text(tmp_path))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = make_text(tmp_path, vocab_size=VOCABULARY - 2)
    with pytest.raises(InputError, match=r"another vocabulary \(280 entries, \w+\) than the data'"):
        quiet_trainer().test(make_translator(), other, ckpt_path=str(tmp_path / "last.ckpt"))


def test_translator_without_tokenizer_translates_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Translator has no tokenizer: fit with a data module"):
        make_translator().translate(torch.tensor([[5, 2]]))
    data = make_text(tmp_path)
    data.setup("fit")
    trainer = quiet_trainer(limit_train_batches=1)
    trainer.fit(make_translator(), data.train_dataloader(), data.val_dataloader())
    assert "val/bleu" not in trainer.callback_metrics
    assert trainer.callback_metrics["val/ppl"] > 1


def test_translator_refuses_sharding(monkeypatch: Any) -> None:
    task = make_translator()
    monkeypatch.setattr(task, "_device_mesh", object())
    with pytest.raises(InputError, match="Give the Trainer the strategy ddp"):
        task.configure_model()


def test_translator_refuses_other_networks() -> None:
    with pytest.raises(InputError, match="Linear is not a sequence model, since it has no vocab"):
        make_translator(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1, got 1.0"),
        ({"beam_size": 0}, "beam_size must be a whole number of at least 1, got 0"),
        ({"extra_length": -1}, "extra_length must be a whole number of at least 0, got -1"),
        ({"length_penalty": -0.1}, "length_penalty must be a number of at least 0, got -0.1"),
    ],
)
def test_translator_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_translator(**options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    torch.manual_seed(0)
    trained = make_translator(lr_scheduler=warm_up)
    trainer = quiet_trainer(max_epochs=3, limit_val_batches=0)
    trainer.fit(trained, make_text(tmp_path_factory.mktemp("text")))
    return trained.eval()


def test_translate_lines_keeps_the_order(trained: Translator) -> None:
    lines = [source for source, _ in draw_pairs(40, seed=3)]
    alone = [translate_lines(trained, [line])[0][0] for line in lines]
    assert len(set(alone)) > 5
    for options in (None, LineOptions(tokens_a_batch=1), LineOptions(tokens_a_batch=9)):
        assert translate_lines(trained, lines, options) == (alone, [])


def test_translate_lines_keeps_empty_lines(trained: Translator) -> None:
    done: list[int] = []
    found, _ = translate_lines(trained, ["", "eins", " \t", "zwei zwei"], on_translated=done.append)
    assert (found[0], found[2]) == ("", "")
    assert found[1]
    assert sum(done) == 4
    assert translate_lines(trained, []) == ([], [])


def test_translate_lines_cuts_and_reports_long_lines(trained: Translator) -> None:
    long = " ".join(["drei"] * 30)
    found, cut = translate_lines(trained, ["eins", long, "vier"], LineOptions(max_length=10))
    tokens = trained.tokenizer.encode([long])[0][:10]  # type: ignore[union-attr]
    assert cut == [1]
    assert found[1] == trained.translate(torch.tensor([[*tokens, EOS]]))[0]


def test_translate_lines_passes_beam_and_penalty(trained: Translator, monkeypatch: Any) -> None:
    given: list[dict[str, Any]] = []

    def translate(source: torch.Tensor, **options: Any) -> list[str]:
        given.append(options)
        return [""] * len(source)

    monkeypatch.setattr(trained, "translate", translate)
    translate_lines(trained, ["eins"])
    translate_lines(trained, ["eins"], LineOptions(beam_size=7, length_penalty=0.0))
    assert given == [
        {"beam_size": None, "length_penalty": None},
        {"beam_size": 7, "length_penalty": 0.0},
    ]


def test_translate_lines_refuses_bad_settings() -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        translate_lines(make_translator(), ["eins"])
    with pytest.raises(InputError, match="tokens_a_batch must be a whole number of at least 1"):
        LineOptions(tokens_a_batch=0)
    with pytest.raises(InputError, match="max_length must be a whole number of at least 1"):
        LineOptions(max_length=0)

"""Translator: trains any encoder–decoder network, and translates batches and lines with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nmlightning.errors import InputError, check_share, check_whole_number
from nmlightning.optim.param_groups import WeightDecayScope, parameter_groups
from nmlightning.surgery.recipes import check_recipes
from nmlightning.tasks import optimization
from nmlightning.tasks.checkpoint_match import check_same_network, remember_arguments
from nmlightning.tasks.numerics import task_callbacks
from nmlightning.translation import decoding
from nmlightning.translation.corpus import TranslationBatch
from nmlightning.translation.metrics import (
    TokenLoss,
    TrainingWindow,
    TranslationMetrics,
    published_bleu,
    token_loss,
)
from nmlightning.translation.sources import import_text_package
from nmlightning.translation.tokenizer import CHECKPOINT_KEY, EOS, PAD, JointBPE

Stage = Literal["val", "test"]


class Translator(pl.LightningModule):
    """Trains `net` to translate and logs loss, perplexities, tokens/s and, in evaluation, BLEU.

    | name | what |
    |---|---|
    | `train/loss` | smoothed cross-entropy, nats a subword: the mean since it was last logged |
    | `train/ppl` | perplexity a subword, without smoothing, since it was last logged |
    | `train/tokens_per_s` | of source and target together, without padding, of all processes |
    | `val/loss` | cross-entropy without smoothing, nats a subword |
    | `val/ppl` | perplexity a subword, its exponential; the sentence's end counts as one |
    | `val/word_ppl` | perplexity a word of the text as written, one more for the sentence's end |
    | `val/bleu` | SacreBLEU (13a, mixed case), 0 … 100, of greedy translations |

    and the same under `test/`, where BLEU is of beam search and is printed with the signature of
    `sacrebleu`, for publication. The text is the tokenizer's, detokenized.

    Args:
        net: a sequence model, such as `Transformer`; see `nmlightning.models`.
        optimizer: called with the parameter groups; its own `weight_decay` is that of the group
            that decays.
        lr_scheduler: called with the optimizer.
        lr_interval: whether the schedule moves after each `step` or each `epoch`.
        label_smoothing: ε, at least 0 and less than 1, in training only.
        beam_size: hypotheses a sentence in testing and prediction; 1 is greedy.
        length_penalty: α of Wu et al. (2016), of the beam search: 0 favours short translations.
        extra_length: by how many tokens a translation may be longer than its source.
        weight_decay_scope: `all`, `no_norm` (norms, gains and biases exempt), `no_conv` or
            `last_layer`.
        split: "muon" marks parameter groups by `use_muon`, as timm's and pytorch_optimizer's Muon
            read it: hidden linear layers are True, all else is for AdamW.
        compile: compile the network in training with `torch.compile`, for shapes that vary. The
            first step then takes minutes, which is announced.

    Attributes:
        tokenizer: the data module's, from `setup` on, or the checkpoint's. It is in every
            checkpoint, so that one alone is enough to translate.
        lr: the rate that `LearningRateFinder` or `Tuner.lr_find` has set; None is the optimizer's.

    Raises:
        InputError: for a setting outside what is allowed or a network that is no sequence model; in
            training for a vocabulary that is larger than the network's, or under
            `ModelParallelStrategy`; on loading for a checkpoint of another network, of another
            vocabulary or, in a Trainer, of another recipe of norms.

    Examples:
        >>> from torch.optim import Adam
        >>> from nmlightning.models import Transformer
        >>> net = Transformer(vocab_size=100, width=32, hidden=64, heads=2)
        >>> task = Translator(net, optimizer=lambda groups: Adam(groups, lr=7e-4))
    """

    lr = optimization.FoundLearningRate()

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: optimization.Interval = "step",
        label_smoothing: float = 0.1,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        extra_length: int = 50,
        weight_decay_scope: WeightDecayScope = "no_norm",
        compile: bool = False,
        split: Literal["muon"] | None = None,
    ) -> None:
        super().__init__()
        missing = [n for n in ("vocab_size", "begin", "next_logits") if not hasattr(net, n)]
        if missing:
            raise InputError(
                f"{type(net).__name__} is not a sequence model, since it has no {missing[0]}: give "
                "one of nmlightning.models, such as Transformer or AttentionLSTM, or one of that "
                "interface."
            )
        self.label_smoothing = check_share("label_smoothing", label_smoothing)
        self.beam_size = check_whole_number("beam_size", beam_size)
        self.extra_length = check_whole_number("extra_length", extra_length, 0)
        remember_arguments(
            self,
            *("lr_interval", "label_smoothing", "beam_size", "length_penalty", "extra_length"),
            *("weight_decay_scope", "compile", "split"),
        )
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.length_penalty = decoding.check_length_penalty(length_penalty)
        self.weight_decay_scope = weight_decay_scope
        self.split = split
        self.compile_network = compile
        self._is_compiled = False
        self.tokenizer: JointBPE | None = None
        self.metrics = nn.ModuleDict({f"of_{s}": TranslationMetrics() for s in get_args(Stage)})
        self._window = TrainingWindow()
        self._last_step = 0  # that a batch has ended with
        self._is_first_window = True
        self._tested: list[tuple[str, str]] = []

    def setup(self, stage: str) -> None:
        """Take the data's vocabulary, and compile once, after callbacks have swapped norms."""
        if stage == "test":
            import_text_package("sacrebleu")  # an error here comes before all is translated
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            rows, entries = cast(int, self.net.vocab_size), tokenizer.vocab_size
            if rows < entries:
                raise InputError(
                    f"the tokenizer has {entries:,} entries and {type(self.net).__name__} "
                    f"embeddings for {rows:,}: set the network's vocab_size to {entries}."
                )
            self.tokenizer = tokenizer
        if self.compile_network and not self._is_compiled:
            self.net.compile(dynamic=True)
            self._is_compiled = True

    def configure_callbacks(self) -> list[pl.Callback]:
        return task_callbacks("Translator", self.compile_network)

    def configure_model(self) -> None:
        """Refuse Lightning's `ModelParallelStrategy`: processes search for different lengths."""
        if self.device_mesh is not None:
            raise InputError(
                "Translator does not shard its network: each process translates its own sentences "
                "with all weights. Give the Trainer the strategy ddp."
            )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits (N, T, V) of what follows each token of `target` (N, T)."""
        logits: Tensor = self.net(source, target)
        return logits

    def translate(
        self, source: Tensor, *, beam_size: int | None = None, length_penalty: float | None = None
    ) -> list[str]:
        """Return the translations of sentences given as tokens (N, S), as text.

        Args:
            source: the tokens of each sentence and EOS, padded with PAD.
            beam_size: hypotheses a sentence; by default the task's.
            length_penalty: α of the beam search; by default the task's.

        Raises:
            InputError: the task has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "Translator has no tokenizer: fit with a data module that has one, load a "
                "checkpoint, or set its attribute."
            )
        beam = self.beam_size if beam_size is None else beam_size
        net = cast(decoding.SequenceModel[Any], self.net)
        if beam == 1:
            found = decoding.greedy_search(net, source, extra_length=self.extra_length)
        else:
            found = decoding.beam_search(
                net,
                source,
                beam_size=beam,
                length_penalty=self.length_penalty if length_penalty is None else length_penalty,
                extra_length=self.extra_length,
            )
        return self.tokenizer.decode(found)

    def on_train_batch_start(self, batch: TranslationBatch, batch_idx: int) -> None:
        self._window.resume()

    def on_validation_start(self) -> None:
        self._window.pause()

    def training_step(self, batch: TranslationBatch, batch_idx: int) -> Tensor:
        step = self._loss_of(batch, self.label_smoothing)
        self._window.add(step, (batch.source != PAD).sum() + step.tokens)
        return step.loss

    def on_train_batch_end(self, outputs: Any, batch: TranslationBatch, batch_idx: int) -> None:
        """Log when the loggers do, after the step; before the first time what there is so far."""
        is_due, self._last_step = self._ends_window(self._last_step), self.global_step
        if not (is_due or self._is_first_window):
            return
        for name, value in self._window.read(lambda sums: self.all_gather(sums)).items():
            self.log(f"train/{name}", value, prog_bar=name == "ppl", batch_size=1)
        if is_due:
            self._window.clear()
            self._is_first_window = False

    def training_sums(self) -> dict[str, Any]:
        """Return what `ExactResume` keeps: the means since the last logging."""
        window, is_first = self._window.state_dict(), self._is_first_window
        return {"window": window, "last_step": self._last_step, "is_first": is_first}

    def load_training_sums(self, sums: dict[str, Any]) -> None:
        """Resume from there; the checkpoint may come before `on_train_batch_end` of its step."""
        is_due, self._last_step = self._ends_window(sums["last_step"]), self.global_step
        self._window.load_state_dict({} if is_due else sums["window"], self.device)
        self._is_first_window = sums["is_first"] and not is_due

    def _ends_window(self, last_step: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.global_step % every == 0 and self.global_step != last_step

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        self._evaluate("val", batch, beam_size=1)

    def test_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        self._tested += self._evaluate("test", batch, self.beam_size)

    def predict_step(self, batch: TranslationBatch, batch_idx: int) -> list[str]:
        """Return the translation of each source sentence."""
        return self.translate(batch.source)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")
        if self._tested:
            rank_zero_info(f"Translator: test {published_bleu(self._tested)}")
        self._tested = []

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.net, None, self.weight_decay_scope, self.split)
        optimizer = optimization.make_optimizer(self.optimizer, groups)
        optimization.set_learning_rate(optimizer, self.lr)
        return optimization.add_schedule(optimizer, self.lr_scheduler, self.lr_interval)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer, as text."""
        if self.tokenizer is not None:
            checkpoint[CHECKPOINT_KEY] = self.tokenizer.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network, vocabulary or, in a Trainer, recipe."""
        check_same_network(self, checkpoint)
        if CHECKPOINT_KEY in checkpoint:
            stored = JointBPE.from_json(checkpoint[CHECKPOINT_KEY])
            current = self.tokenizer
            if current is not None and current.digest != stored.digest:
                raise InputError(
                    f"the checkpoint was trained with another vocabulary ({stored.vocab_size:,} "
                    f"entries, {stored.digest}) than the data's ({current.vocab_size:,} entries, "
                    f"{current.digest}): set data.tokenizer to the checkpoint, which holds its own."
                )
            self.tokenizer = stored
        if self._trainer is not None:
            check_recipes(self, checkpoint)

    def _loss_of(self, batch: TranslationBatch, label_smoothing: float = 0.0) -> TokenLoss:
        if not isinstance(batch, TranslationBatch):
            kind = type(batch).__name__
            raise InputError(f"{type(self).__name__} takes a TranslationBatch, got a {kind}.")
        logits = self(batch.source, batch.target[:, :-1])
        return token_loss(logits, batch.target[:, 1:], label_smoothing)

    def _evaluate(
        self, stage: Stage, batch: TranslationBatch, beam_size: int
    ) -> list[tuple[str, str]]:
        """Add a batch to the metrics; return each translation with its reference."""
        metrics: Any = self.metrics[f"of_{stage}"]
        metrics.add(self._loss_of(batch), batch.words)
        if self.tokenizer is None or not batch.references:
            return []
        found = self.translate(batch.source, beam_size=beam_size)
        metrics.add_translations(found, batch.references)
        return list(zip(found, batch.references, strict=True))

    def _log_metrics(self, stage: Stage) -> None:
        metrics: Any = self.metrics[f"of_{stage}"]
        for name, value in metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("ppl", "bleu"), sync_dist=True)


@dataclass(frozen=True)
class LineOptions:
    """Options of `translate_lines`.

    Attributes:
        tokens_a_batch: padded tokens of the source sentences of a batch, at most; a longer sentence
            is a batch of its own.
        max_length: tokens of a sentence, at most; the rest is not translated.
        beam_size: hypotheses a sentence; None means the task's, 1 is greedy.
        length_penalty: of the beam search; None means the task's.
    """

    tokens_a_batch: int = 2000
    max_length: int = 256
    beam_size: int | None = None
    length_penalty: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens_a_batch", "max_length"):
            check_whole_number(name, getattr(self, name))
        if self.beam_size is not None:
            check_whole_number("beam_size", self.beam_size)
        if self.length_penalty is not None:
            decoding.check_length_penalty(self.length_penalty)


def translate_lines(
    task: Translator,
    lines: Sequence[str],
    options: LineOptions | None = None,
    on_translated: Callable[[int], object] | None = None,
) -> tuple[list[str], list[int]]:
    """Return the translation of each line, in order, and the positions of those that were cut.

    Lines are sorted by length and translated in batches. One of white space alone stays empty.

    Args:
        task: on the device that translates, in evaluation mode.
        lines: a sentence each.
        options: None means the defaults.
        on_translated: called with the number of lines that are done, after each batch, or None.

    Raises:
        InputError: the task has no tokenizer.
    """
    options = options or LineOptions()
    if task.tokenizer is None:
        raise InputError("the model has no tokenizer: it was not trained as a Translator is.")
    whole = task.tokenizer.encode(lines)
    tokens = [sentence[: options.max_length] for sentence in whole]
    cut = [row for row, sentence in enumerate(whole) if len(sentence) > options.max_length]
    found = [""] * len(lines)
    rows = [row for row, line in enumerate(lines) if line.strip()]
    rows.sort(key=lambda row: len(tokens[row]), reverse=True)
    if on_translated:
        on_translated(len(lines) - len(rows))
    while rows:
        count = max(1, options.tokens_a_batch // (len(tokens[rows[0]]) + 1))
        batch, rows = rows[:count], rows[count:]
        ended = [torch.tensor([*tokens[row], EOS]) for row in batch]
        source = pad_sequence(ended, batch_first=True, padding_value=PAD).to(task.device)
        with torch.inference_mode():
            translations = task.translate(
                source, beam_size=options.beam_size, length_penalty=options.length_penalty
            )
        for row, translation in zip(batch, translations, strict=True):
            found[row] = translation
        if on_translated:
            on_translated(len(batch))
    return found, cut

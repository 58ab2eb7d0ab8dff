"""A language of eight words to translate from, and tasks that are small enough for a test."""

import random
from pathlib import Path
from typing import Any

import torch

from made_sentences import write_pairs
from nmlightning.models import Transformer
from nmlightning.optim.schedules import InverseSquareRootLR
from nmlightning.translation.datamodules import ParallelText
from nmlightning.translation.task import Translator

WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four"}
VOCABULARY = 280


def draw_pairs(count: int, seed: int, longest: int = 4) -> list[tuple[str, str]]:
    """Return sentences of up to `longest` words, translated word by word."""
    draw = random.Random(seed)
    sentences = [
        [draw.choice(list(WORDS)) for _ in range(draw.randint(1, longest))] for _ in range(count)
    ]
    return [(" ".join(s), " ".join(WORDS[word] for word in s)) for s in sentences]


def make_text(folder: Path, **options: Any) -> ParallelText:
    """Return 400 pairs to train with and 30 to validate with."""
    train = write_pairs(folder, "train", draw_pairs(400, seed=1))
    val = write_pairs(folder, "val", draw_pairs(30, seed=2))
    given = {"vocab_size": VOCABULARY, "tokens_a_batch": 200, "max_length": 100, **options}
    return ParallelText(train, val, root=str(folder), **given)


def make_net(vocab_size: int = VOCABULARY, **options: Any) -> Transformer:
    """Return a Transformer of one layer a side."""
    sizes = {"width": 32, "hidden": 64, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return Transformer(vocab_size, **{**sizes, "dropout": 0.0, "norm_first": True, **options})


def make_translator(net: torch.nn.Module | None = None, **options: Any) -> Translator:
    """Return the task of translating with a small network."""
    given = {"optimizer": adam, "beam_size": 2, "extra_length": 5, **options}
    return Translator(make_net() if net is None else net, **given)


def adam(groups: Any) -> torch.optim.Optimizer:
    """Return Adam with a rate for small networks."""
    return torch.optim.Adam(groups, lr=8e-3, betas=(0.9, 0.98))


def warm_up(optimizer: torch.optim.Optimizer) -> InverseSquareRootLR:
    """Return the schedule for it."""
    return InverseSquareRootLR(optimizer, warmup_steps=60)

"""Announces that a network is compiled, which otherwise looks like a run that hangs."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info


class CompilationNotice(pl.Callback):
    """Announces the first batch of each stage, in which `torch.compile` works, and its time.

    Training and evaluation are compiled separately, and a sanity check before the first epoch is
    evaluation. The lines begin with the name of the task.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._started: dict[str, float] = {}
        self._finished: set[str] = set()

    def on_train_batch_start(self, *_: Any) -> None:
        self._begin("training")

    def on_train_batch_end(self, *_: Any) -> None:
        self._end("training")

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        self._begin("evaluation")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._end("evaluation")

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _begin(self, stage: str) -> None:
        if stage not in self._started:
            self._started[stage] = time.perf_counter()
            rank_zero_info(
                f"{self.task}: compiling the network for {stage}: the first step takes a minute or "
                "more."
            )

    def _end(self, stage: str) -> None:
        if stage not in self._finished:
            self._finished.add(stage)
            seconds = time.perf_counter() - self._started[stage]
            step = f"the first step of {stage}, compiled,"
            rank_zero_info(f"{self.task}: {step} took {seconds:.0f} s.")

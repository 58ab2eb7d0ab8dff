"""A callback of Hugging Face's Trainer that records norms, steps and gradients of weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nmlightning.errors import InputError
from nmlightning.optim.step_hooks import StepRule
from nmlightning.tracking.norm_tracker import Log, NormTracker, track_norms
from nmlightning.tracking.step_meter import DEFAULT

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise InputError(
        "nmlightning.tracking.hugging_face needs transformers: pip install transformers accelerate."
    ) from error

_STATE = "norm_tracker.pt"  # in a checkpoint's folder


class NormTrackerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # it is untyped
    """Tracks a Trainer's model and optimizer by `track_norms`, whose keywords these are.

    The records are in the Trainer's `output_dir`. A run that resumes from one of its checkpoints
    there continues them, and the rule's state.

    Args:
        log: called with `{tag: number}` and the step. For the loggers that the Trainer reports to,
            `log=lambda values, step: trainer.log(values)`.

    Raises:
        InputError: for `unclipped_gradient_norm`, since the Trainer clips before it calls anyone.

    Attributes:
        tracker: the handle, once the training has begun.
    """

    def __init__(
        self,
        *,
        every: int | Literal["epoch"] = 1,
        rule: StepRule | None = None,
        log: Log | None = None,
        quantities: Sequence[str] = DEFAULT,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        if "unclipped_gradient_norm" in quantities:
            raise InputError(
                "Hugging Face's Trainer clips gradients before it calls anyone: leave out "
                "unclipped_gradient_norm; its own grad_norm is that of all gradients together."
            )
        self._options: dict[str, Any] = {"every": every, "rule": rule, "log": log}
        self._options |= {"quantities": quantities, "include": include, "exclude": exclude}
        self.tracker: NormTracker | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Track from here on, or from the checkpoint that the training resumes from."""
        origin = {"seed": args.seed, "world_size": args.world_size}
        self.tracker = track_norms(
            model, optimizer, path=args.output_dir, provenance=origin, **self._options
        )
        kept = _folder(args, state) / _STATE
        if state.global_step and kept.is_file():
            self.tracker.load_state_dict(torch.load(kept, "cpu", weights_only=True))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.tracker is not None:
            self.tracker.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the tracker's state with the checkpoint."""
        if self.tracker is not None:
            kept = self.tracker.state_dict()
            if state.is_world_process_zero:
                torch.save(kept, _folder(args, state) / _STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.tracker is not None:
            self.tracker.close(finished=state.global_step >= state.max_steps)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"

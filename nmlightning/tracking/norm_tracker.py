"""track_norms: record norms and steps of weights, and steer them, in a loop of one's own."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nmlightning.errors import InputError, check_lists, check_whole_number
from nmlightning.kernels.dispatch import weight_kernels
from nmlightning.optim.families import StepHooks, find_steps, group_numbers
from nmlightning.optim.scope import has_weights
from nmlightning.optim.step_hooks import StepHookHandle, StepRule, call_before_step
from nmlightning.tracking.step_meter import DEFAULT, StepMeter, check_quantities, pool_layers
from nmlightning.weights.history import NormHistory
from nmlightning.weights.layer_weights import find_recorded_weights
from nmlightning.weights.recorder import KeptRecording, Recorder, keep_recording, rates_of

Log = Callable[[dict[str, float], int], Any]
_SILENT = {
    "step": "No tracked optimizer has stepped: track the one that trains, not one it replaced.",
    "measure": "unclipped_gradient_norm is wanted: call measure() after backward.",
}


def track_norms(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    *,
    every: int | Literal["epoch"] = 1,
    rule: StepRule | None = None,
    log: Log | None = None,
    quantities: Sequence[str] = DEFAULT,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    path: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> "NormTracker":
    """Record the norms of a model's weights in any training loop, by the optimizers' step hooks.

    Call it once model and optimizers are as they train: wrapped, sharded, on their device. A step
    is what each optimizer has stepped in once, whatever accumulates before; one that a GradScaler
    skips is none, but for a fused optimizer's.

    Args:
        model: plain, in DDP, compiled, or sharded by FSDP2 or tensor parallelism along any
            dimensions; every rank has to track it.
        optimizers: one, or several that step in turn. They may wrap others, as accelerate's do.
        every: record and log at every N-th step; "epoch" records only in `end_epoch`, and logs not.
        rule: what steers the steps: `LRCorrection`, `Hyperball`, …; attached to the optimizers.
        log: called on the first rank with `{tag: number}`, of each layer and over `all`, and the
            step: `wandb.log`, or the method of another logger. Without it nothing waits for the
            device.
        quantities: what is logged, and but for `weight_norm` recorded by layer, of `weight_norm`,
            `rotation`, `effective_lr`, `step_norm`, `update_ratio`, `gradient_norm`,
            `unclipped_gradient_norm`, `weight_gradient_cosine`, `spectral_norm`; see `StepMeter`.
        include: glob patterns on weight names to record; empty means all convolutions and linear
            layers.
        exclude: glob patterns on names that are not recorded and not steered.
        path: the folder where `weight_norms.safetensors` is kept; None keeps it in memory.
        provenance: plain data on the run that is written with it, such as seed and world size.

    Returns:
        The handle; `close` it, or use it in a `with` statement.

    Raises:
        InputError: a setting of another kind, a folder that cannot be written to, a pattern that
            matches nothing, an optimizer that calls no step hooks or moves none of the weights,
            what `rule.attach` refuses. Nothing stays attached.

    Examples:
        >>> net = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with track_norms(net, optimizer, log=lambda values, step: print(step)) as tracker:
        ...     net(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        1
        >>> tracker.history
        NormHistory(2 records of 1 weights, steps 0 to 1)
    """
    check_lists(include=include, exclude=exclude)
    _check_settings(every, rule, log)
    wanted = check_quantities(quantities)
    one = hasattr(optimizers, "step") or not isinstance(optimizers, Iterable)
    given: list[Any] = [optimizers] if one else [*optimizers]  # type: ignore[misc]  # it is several
    if not isinstance(model, nn.Module) or given in ([], [None]):
        raise InputError("track_norms takes a model, and the optimizers that train it.")
    weights = find_recorded_weights(model, include, exclude)
    nested = [find_steps(optimizer, in_place=False) for optimizer in given]
    moved = {q for steps in nested for q in group_numbers(steps[-1])}
    if not any(weight.parameter in moved for weight in weights):
        raise InputError(
            "The optimizers move none of the model's weights: track the model and the optimizers "
            "as the training has prepared them, also if it shards or wraps them."
        )
    NormHistory.from_arrays({}, [], [], provenance=provenance)  # refuses what cannot be written
    recorded = [name for name in wanted if name != "weight_norm"]
    origin = {"versions": {"torch": torch.__version__}, **(provenance or {})}
    recorder = Recorder(weights, origin, None, weight_kernels, recorded)
    folder = _check_folder(path)
    with ExitStack() as attached:  # what an error detaches again
        handles = [] if rule is None else _attach(rule, nested, model, (include, exclude), attached)
        meter = StepMeter(recorder, wanted, handles)
        return NormTracker(meter, nested, handles, every, log, folder, attached)


class NormTracker:
    """The handle of `track_norms`.

    Attributes:
        handles: the rule at work on each optimizer that it steers.
        step: how many steps have ended.
        epoch: how many epochs `end_epoch` has ended.
        path: the file of the records; None in memory.
    """

    def __init__(
        self,
        meter: StepMeter,
        nested: Sequence[Sequence[Optimizer]],
        handles: Sequence[StepHookHandle],
        every: int | Literal["epoch"],
        log: Log | None,
        folder: Path | None,
        attached: ExitStack,
    ) -> None:
        self.handles, self.step, self.epoch = list(handles), 0, 0
        self._meter, self._recorder = meter, meter.recorder
        self._every, self._log, self._folder = every, log, folder
        self._kept: KeptRecording | None = None
        self._writes = _is_first_rank()
        self._optimizers = [steps[-1] for steps in nested]
        self._stepped, self._begun = set[int](), set[int]()
        self._rates: dict[int, tuple[float, float]] = {}
        for optimizer in self._optimizers:
            self._rates |= rates_of(optimizer)
        measures = "unclipped_gradient_norm" in meter.recorder.quantities
        self._silent = {"step", "measure"} if measures else {"step"}  # what never was called
        self._resume({})
        for n, steps in enumerate(nested):
            hooks = StepHooks(steps, partial(self._before_step, n), partial(self._after_step, n))
            attached.callback(hooks.remove)
        self._attached = attached.pop_all()

    @property
    def path(self) -> Path | None:
        return None if self._kept is None else self._kept.file

    @property
    def history(self) -> NormHistory:
        """All that is recorded so far; the device is waited for."""
        return self._recorder.history()

    @property
    def is_due(self) -> bool:
        """Whether the next step, or the one in progress, is recorded and logged."""
        return self._is_due(1)

    def _is_due(self, later: int) -> bool:
        return self._every != "epoch" and (self.step + later) % self._every == 0

    def measure(self, scale: float | Tensor = 1.0) -> None:
        """Measure the gradients as they are now, for `unclipped_gradient_norm` and for the rule.

        Call it on every rank between `backward` and what clips: autograd does not know when
        gradients are complete. Before `scaler.unscale_(optimizer)` they are still multiplied by a
        `scale`, `scaler.get_scale()`.
        """
        self._silent.discard("measure")
        if self.is_due or (self._stepped and self._is_due(2)):  # the next step may begin a new one
            self._meter.measure(scale)
        for handle in self.handles:
            handle.measure()

    def end_epoch(self) -> None:
        """Record the end of an epoch, and write what is recorded; every rank has to call it."""
        self._end_step()
        self._warn_if_silent("step")
        self._recorder.record(self.step, self.epoch, self._rates)
        self._recorder.end_epoch()
        for handle in self.handles:
            handle.warn_if_skipped()
        self.epoch += 1
        self.save()

    def save(self, path: str | Path | None = None) -> None:
        """Write all records to a file, or those that are new to the tracker's own."""
        if path is not None:
            self.history.save(path)
        elif self._kept is not None and self._writes:
            self._recorder.save(self._kept.file)

    def close(self, *, finished: bool = True) -> None:
        """Detach everything, and write the records, as those of a run that `finished` or not."""
        self._end_step()
        if finished:
            self._recorder.finish()
            self._warn_if_silent("step")
        self.remove()
        self.save()

    def remove(self) -> None:
        """Let the optimizers step as they did before."""
        self._attached.close()

    def __enter__(self) -> "NormTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        self.close(finished=kind is None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs that resumes this one; every rank has to call it."""
        self._end_step()
        self.save()
        return {
            "step": self.step,
            "epoch": self.epoch,
            "recording": self._kept and self._kept.state_dict(self._recorder.last_step),
            "meter": self._meter.state_dict(),
            "handles": [handle.state_dict() for handle in self.handles],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, with the model's and the optimizers' states loaded.

        Raises:
            InputError: it was steered otherwise, or tracked other weights.
        """
        if len(state["handles"]) != len(self.handles):
            raise InputError(
                f"The checkpoint was steered in {len(state['handles'])} optimizers, and this run "
                f"is in {len(self.handles)}: resume with the same."
            )
        for handle, kept in zip(self.handles, state["handles"], strict=True):
            handle.load_state_dict(kept)
        self.step, self.epoch = state["step"], state["epoch"]
        self._meter.load_state_dict(state["meter"])
        self._resume(state["recording"] or {})

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Begin the records, or continue those of the run in `state`."""
        earlier = None
        if self._folder is not None:
            self._kept, earlier = keep_recording(self._folder, state)
        self._recorder.resume(earlier, None if self._kept is None else self._kept.run)
        if earlier is None:
            self._recorder.record(self.step, self.epoch, self._rates)

    def _before_step(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number in self._stepped:  # the others do not step in each step
            self._end_step()
        if not self.is_due:
            return None
        return call_before_step(partial(self._begin, number), args, kwargs)

    @torch.no_grad()
    def _begin(self, number: int) -> None:
        if number not in self._begun:  # LBFGS calls its closure several times
            self._begun.add(number)
            self._rates |= rates_of(self._optimizers[number])
            self._meter.begin(self._optimizers[number])
            self._meter.measure_step(self._optimizers[number])

    def _after_step(self, number: int) -> None:
        self._silent.discard("step")
        self._stepped.add(number)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _end_step(self) -> None:
        """Record and log the step that has begun, if any, and that is due."""
        if not self._stepped:
            return
        is_due = self.is_due
        self.step += 1
        self._stepped.clear()
        self._begun.clear()
        if is_due:
            self._warn_if_silent("measure")
            values = self._meter.finish()
            norms = self._meter.norms
            self._recorder.record(self.step, self.epoch, self._rates, values, norms)
            if self._log is None:
                self._meter.forget()
            else:
                numbers = self._meter.read()
                numbers |= pool_layers(numbers, list(self._meter.layers))
                if numbers and self._writes:
                    self._log(numbers, self.step)

    def _warn_if_silent(self, what: str) -> None:
        if what in self._silent:
            self._silent.remove(what)
            if self._writes:
                warnings.warn(_SILENT[what], stacklevel=3)


def _attach(
    rule: StepRule,
    nested: Sequence[Sequence[Optimizer]],
    model: nn.Module,
    within: tuple[Sequence[str], Sequence[str]],
    attached: ExitStack,
) -> list[StepHookHandle]:
    """Attach a rule to the optimizers that have weights for it, or where it says why none has."""
    rule = copy.copy(rule)
    rule.within = ((), ()) if rule.include else within
    fitting = [each for each in nested if has_weights(each[-1], model, rule.choice)]
    handles = []
    for steps in fitting or nested:
        handles.append(rule.attach(steps[0], model))
        attached.callback(handles[-1].remove)
    return handles


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _check_folder(path: object) -> Path | None:
    """Return the folder, made if it was not there, after a trial of the first rank's to write."""
    if path is None:
        return None
    try:
        folder = Path(path)  # type: ignore[arg-type]  # it may be anything
        if _is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"path is a folder to write to, got {path!r}: {error}.") from error
    return folder


def _check_settings(every: object, rule: object, log: object) -> None:
    if every != "epoch":
        check_whole_number("every", every)  # type: ignore[arg-type]  # it may be anything
    if not isinstance(rule, StepRule | None):
        raise InputError(f"rule is a rule, such as Hyperball(), or None, got {rule!r}.")
    if not (log is None or callable(log)):
        raise InputError(f"log is a function of a dict and a step, or None, got {log!r}.")

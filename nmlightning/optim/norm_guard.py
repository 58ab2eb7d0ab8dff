"""guard_norms: batch norms of torch that forget batches which no step was taken for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from nmlightning.errors import InputError


class NormGuard:
    """Keeps the running statistics of a model's norms from batches that cost a step.

    - A forward in training whose new statistics are not all finite leaves those of its norm as they
      were, with `num_batches_tracked`.
    - Where a GradScaler skips a step of an optimizer, the statistics of norms go back to where they
      were at the step before, over all batches whose gradients were accumulated: of those with
      parameters in that optimizer, and of those without parameters.

    The layers stay torch's own: hooks on them do it, until `remove`. It works for every batch norm,
    SyncBatchNorm and instance norm with running statistics; this library's leave out themselves
    what is not finite, channel by channel. A forward without gradients, as in `update_bn`, is only
    kept finite.
    """

    def __init__(self, model: nn.Module, scaler: Any = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"guard_norms takes a model, got {type(model).__name__}.")
        if scaler is not None and not callable(getattr(scaler, "is_enabled", None)):
            raise InputError(f"scaler is a GradScaler, or None, got {type(scaler).__name__}.")
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        if not norms:
            name = type(model).__name__
            raise InputError(f"{name} has no norm with running statistics to guard.")
        self._now: dict[nn.Module, list[Tensor]] = {}  # before the forward that is going on
        self._kept: dict[nn.Module, list[Tensor]] = {}  # before the first one since the last step
        self._hooks = [norm.register_forward_pre_hook(self._enter) for norm in norms]
        self._hooks += [norm.register_forward_hook(self._leave) for norm in norms]
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self._scaler is not None:
            self._step = scaler.step
            scaler.step = self._step_or_restore

    def remove(self) -> None:
        """Let the norms and the scaler do as they did."""
        for hook in self._hooks:
            hook.remove()
        if self._scaler is not None and vars(self._scaler).get("step") == self._step_or_restore:
            del self._scaler.step
        self._kept.clear()

    def _enter(self, norm: nn.Module, _: Any) -> None:
        if norm.training:
            self._now[norm] = [buffer.clone() for buffer in norm.buffers(recurse=False)]
            if self._scaler is not None and torch.is_grad_enabled():
                self._kept.setdefault(norm, self._now[norm])

    @torch.no_grad()
    def _leave(self, norm: nn.Module, *_: Any) -> None:
        before = self._now.pop(norm, None)
        if before is None:
            return
        after = list(norm.buffers(recurse=False))
        finite = torch.stack([buffer.isfinite().all() for buffer in after]).all()
        _write(after, [torch.where(finite, *pair) for pair in zip(after, before, strict=True)])

    def _step_or_restore(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        taken: list[bool] = []

        def note(stepped: Optimizer, *_: Any) -> None:
            found_inf = getattr(stepped, "found_inf", None)  # of one that is fused
            taken.append(found_inf is None or not bool(found_inf))

        hook = optimizer.register_step_post_hook(note)
        try:
            answer = self._step(optimizer, *args, **kwargs)
        finally:
            hook.remove()
        owned = {id(q) for group in optimizer.param_groups for q in group["params"]}
        for norm in list(self._kept):
            parameters = [id(q) for q in norm.parameters(recurse=False)]
            if parameters and owned.isdisjoint(parameters):
                continue
            kept = self._kept.pop(norm)
            if not any(taken):
                _write(norm.buffers(recurse=False), kept)
        return answer


def _write(buffers: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Set values behind the back of autograd, which keeps the buffers and does not use them."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)


def guard_norms(model: nn.Module, scaler: Any = None) -> NormGuard:
    """Keep the running statistics of batch norms where AMP skips a step or a batch is not finite.

    See `NormGuard`, which is returned, and whose `remove` ends it; in Lightning it is the callback
    `nmlightning.callbacks.NormGuard`.

    Args:
        model: holds the norms. Call it before `torch.compile`.
        scaler: the GradScaler of the loop; None guards only against what is not finite.

    Raises:
        InputError: the model is none, or has no norm with running statistics; another scaler.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> guard = guard_norms(model, torch.amp.GradScaler("cpu"))
        >>> _ = model(torch.full((4, 2), torch.inf))
        >>> model[1].running_mean, model[1].num_batches_tracked
        (tensor([0., 0., 0.]), tensor(0))
    """
    return NormGuard(model, scaler)

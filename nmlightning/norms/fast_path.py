"""Layer and RMS norms in torch's encoder layers, and where torch.fx and torch.jit read them.

`nn.TransformerEncoderLayer` hands its norms' weights to a fused kernel, whatever class they have,
unless one of its `modules()` has hooks. A whole `nn.TransformerEncoder` makes nested tensors for
that kernel, unless `use_nested_tensor` is false.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from traceback import walk_stack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit._trace import TracerWarning

from nmlightning.errors import InputError

_HOOKED = nn.Identity()
_HOOKED.register_forward_pre_hook(lambda *_: None)


def named_modules_in_encoder(
    self: nn.Module, memo: Any = None, prefix: str = "", *args: Any, **kwargs: Any
) -> Iterator[tuple[str, nn.Module]]:
    """Yield what torch yields; for its encoder layer also a hook, so that it calls forward."""
    yield from nn.Module.named_modules(self, memo, prefix, *args, **kwargs)
    if is_in_encoder_layer():
        yield f"{prefix}.hooked", _HOOKED


def is_in_encoder_layer() -> bool:
    """Return whether torch's encoder layer looks through modules, or whatever is compiled does."""
    if torch.compiler.is_dynamo_compiling():
        return True
    frames, home = islice(walk_stack(None), 8), nn.TransformerEncoderLayer.__module__
    return any(frame.f_globals.get("__name__") == home for frame, _ in frames)


def guard_encoders(modules: Iterable[nn.Module]) -> None:
    """Switch nested tensors off where a layer is ours, and back on without any of ours."""
    before = "_use_nested_tensor_before_swap"
    for encoder in modules:
        if isinstance(encoder, nn.TransformerEncoder):
            state, parts = vars(encoder), encoder.layers.modules()
            ours = any(hasattr(part, "backend_for") for part in parts)
            if ours and before not in state and "use_nested_tensor" in state:
                state[before], state["use_nested_tensor"] = state["use_nested_tensor"], False
            elif not ours and before in state:
                state["use_nested_tensor"] = state.pop(before)


def traceable(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let torch.fx record a call of a layer as of torch's own norms, and tracing not warn of it."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._is_tracing():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TracerWarning)
                return forward(self, *args, **kwargs)
        input: Any = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call


def refuse_scripting(layer: nn.Module) -> NoReturn:
    """Say for `torch.jit.script`, which calls it, that it cannot compile such a layer."""
    raise InputError(
        f"torch.jit.script cannot compile {type(layer).__name__}: use torch.jit.trace or "
        'torch.export, or swap_norms(model, "l2", kinds=["layer", "rms"]) first.'
    )

"""Layer and RMS norms in torch's encoder layers, and where torch.fx and torch.jit read them.

`nn.TransformerEncoderLayer` hands its norms' weights to a fused kernel, whatever class they have,
unless its activation is neither ReLU nor GELU: that flag is the switch it offers. A whole
`nn.TransformerEncoder` makes nested tensors for that kernel, unless `use_nested_tensor` is false.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit._trace import TracerWarning
from torch.nn.modules.module import register_module_module_registration_hook

from nmlightning.errors import InputError


def guard_encoders(modules: Iterable[nn.Module]) -> None:
    """Switch the fast paths off where a norm is ours, and back on where none is any more."""
    watch_encoders()
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            _switch(module, "activation_relu_or_gelu", module.children())
        elif isinstance(module, nn.TransformerEncoder):
            norms = (child for layer in module.layers for child in layer.children())
            _switch(module, "use_nested_tensor", norms)


def _switch(module: nn.Module, flag: str, norms: Iterable[nn.Module]) -> None:
    # Of the layer and RMS norms only ours have a backend.
    classes = nn.LayerNorm | nn.RMSNorm
    off = any(isinstance(norm, classes) and hasattr(norm, "backend_for") for norm in norms)
    state, before = vars(module), f"_{flag}_before_swap"
    if off and flag in state and before not in state:
        state[before], state[flag] = state[flag], 0
    elif not off and before in state:
        state[flag] = state.pop(before)


@functools.cache
def watch_encoders() -> None:
    """Guard a layer from now on when a norm is put into it by hand; set once for the process."""

    def guard(module: nn.Module, name: str, child: Any) -> None:
        if isinstance(module, nn.TransformerEncoderLayer):
            others = (other for key, other in module.named_children() if key != name)
            _switch(module, "activation_relu_or_gelu", (child, *others))

    register_module_module_registration_hook(guard)


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

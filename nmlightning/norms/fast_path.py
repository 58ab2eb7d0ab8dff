"""Keeps torch's encoder layers from computing L2 in evaluation where their norms are ours.

`nn.TransformerEncoderLayer` hands its norms' weights to a fused kernel, whatever class they have,
unless its activation is neither ReLU nor GELU: that flag is the switch it offers. A whole
`nn.TransformerEncoder` makes nested tensors for that kernel, unless it is told not to.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from nmlightning.norms.layer_norm import LpLayerNorm, LpRMSNorm

_OURS = (LpLayerNorm, LpRMSNorm)
_BEFORE = {
    "activation_relu_or_gelu": "_activation_relu_or_gelu_before_swap",
    "use_nested_tensor": "_use_nested_tensor_before_swap",
}


def guard_fast_paths(modules: Iterable[nn.Module]) -> None:
    """Switch the fast paths off where a norm is ours, and back on where none is any more."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            ours = any(isinstance(child, _OURS) for child in module.children())
            _switch(module, "activation_relu_or_gelu", ours)
        elif isinstance(module, nn.TransformerEncoder):
            norms = (child for layer in module.layers for child in layer.children())
            _switch(module, "use_nested_tensor", any(isinstance(norm, _OURS) for norm in norms))


def _switch(module: nn.Module, flag: str, off: bool) -> None:
    state, before = vars(module), _BEFORE[flag]
    if off and flag in state and before not in state:
        state[before], state[flag] = state[flag], 0
    elif not off and before in state:
        state[flag] = state.pop(before)


def _guard_layer(module: nn.Module, name: str, child: Any) -> None:
    """Do so for a layer when a norm is put there by hand."""
    if isinstance(module, nn.TransformerEncoderLayer):
        others = (other for key, other in module.named_children() if key != name)
        ours = any(isinstance(norm, _OURS) for norm in (child, *others))
        _switch(module, "activation_relu_or_gelu", ours)


register_module_module_registration_hook(_guard_layer)

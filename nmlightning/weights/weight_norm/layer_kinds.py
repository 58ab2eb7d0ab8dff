"""The weights that layers of each kind have."""

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from nmlightning.errors import InputError, check_choice
from nmlightning.weights.weight_norm.torch_internals import attention_weights, recurrent_weights

LayerKind = Literal["conv", "linear", "recurrent", "embedding"]
LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)


def choose_layers(layers: Sequence[str] | None, include: Collection[str]) -> tuple[LayerKind, ...]:
    """Return the kinds, sorted; None means convolutions, or none where weights are named.

    Raises:
        InputError: another kind; nothing chosen.
    """
    if layers is None:
        return () if include else ("conv",)
    for kind in layers:
        check_choice("layers", kind, LAYER_KINDS)
    if not layers and not include:
        raise InputError(f"layers is empty: name {', '.join(LAYER_KINDS)} or several.")
    return tuple(kind for kind in LAYER_KINDS if kind in layers)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return of which kind a layer is; None for what has no weight of its own, and for others."""
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return "linear"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    return "embedding" if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


def weights_of(module: nn.Module) -> list[str]:
    """Return the names of the weights that a layer of some kind computes with.

    Those of `nn.MultiheadAttention` are its projections into heads; the one out of them is an
    `nn.Linear` inside it.
    """
    if isinstance(module, nn.MultiheadAttention):
        return attention_weights(module)
    if isinstance(module, nn.RNNBase):
        return recurrent_weights(module)
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return ["weight"] if kind_of(module) else []


def is_plain(module: nn.Module, weight: str) -> bool:
    """Whether a weight is a parameter, or one under a parametrization of torch."""
    return weight in module._parameters or parametrize.is_parametrized(module, weight)

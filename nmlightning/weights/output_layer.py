"""Which layer of a model gives its output."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def find_output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer whose weight gives a model's output, or None if none does.

    It is what `get_output_embeddings()` of the model, or of a part of it, returns, as in Hugging
    Face's models: an embedding, where the output is computed with its weight; else the last
    `nn.Linear`, but for those inside an `nn.MultiheadAttention`.
    """
    for module in model.modules():
        tell = getattr(module, "get_output_embeddings", None)
        layer = tell() if callable(tell) else None
        if isinstance(layer, nn.Module):
            return layer
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    return linears[-1] if linears else None

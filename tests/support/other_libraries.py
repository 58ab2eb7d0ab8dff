"""Small networks of other libraries that have layer or RMS norms."""

from typing import Any

import pytest
import torchvision
from torch import nn

SIZES: dict[str, int] = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip


def vit() -> nn.Module:
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 64, 64, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    return net


def convnext() -> Any:
    timm = pytest.importorskip("timm")
    return timm.models.ConvNeXt(depths=[1] * 4, dims=[8, 8, 8, 64], num_classes=5)


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))

"""Builds the models of public zoos at small size, without weights: what `zoo.py` tries."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from transformers import AutoConfig, AutoModel

MAX_PARAMETERS = 60_000_000
CLASSES = 10
SIZES = (64, 128, 224)  # pixels; the first that a model takes
BATCH = 2

# Transformers takes the words that a configuration has, whatever it calls them inside.
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
VISION = {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
SPEECH = {"conv_dim": [8] * 3, "conv_kernel": [4] * 3, "conv_stride": [2] * 3,
          "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4,
          "num_conv_pos_embedding_groups": 2}  # fmt: skip
TOWER = {**TINY, **VISION}
HUGGING_FACE: Mapping[str, Mapping[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "phi": {}, "phi3": {}, "gpt2": {}, "gpt_neox": {}, "opt": {"ffn_dim": 64,
    "word_embed_proj_dim": 32}, "bloom": {}, "stablelm": {}, "olmo2": {}, "mamba": {},
    "bert": {}, "roberta": {}, "distilbert": {"dim": 32, "hidden_dim": 64}, "albert":
    {"embedding_size": 16}, "modernbert": {}, "deberta-v2": {}, "t5": T5, "bart": BART,
    "vit": VISION, "dinov2": VISION, "convnext": STAGES, "resnet": STAGES,
    "wav2vec2": SPEECH, "clip": {"text_config": TINY, "vision_config": TOWER},
}  # fmt: skip


@dataclass
class Case:
    """A model and what it is called with: in evaluation, and in training where that differs."""

    model: nn.Module
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    training_arguments: tuple[Any, ...] | None = None


class TooLarge(Exception):
    """The model has more than MAX_PARAMETERS."""


def list_zoos() -> dict[str, list[str]]:
    """Return the architectures of each zoo."""
    return {
        "timm": timm.list_models(),
        "torchvision": torchvision.models.list_models(),
        "Hugging Face": list(HUGGING_FACE),
    }


def build(zoo: str, name: str) -> Case:
    """Return an architecture with random weights; TooLarge where that is too much."""
    torch.manual_seed(0)
    make = {"timm": _build_timm, "torchvision": _build_torchvision}.get(zoo, _build_hugging_face)
    case = make(name)
    check_size(case.model)
    return case


def check_size(model: nn.Module) -> None:
    """Raise TooLarge for a model of too many parameters."""
    if sum(q.numel() for q in model.parameters()) > MAX_PARAMETERS:
        raise TooLarge


def _build_timm(name: str) -> Case:
    pretrained = timm.get_pretrained_cfg(name)
    channels, *_, native = pretrained.input_size
    try:
        with torch.device("meta"):
            check_size(timm.create_model(name, num_classes=CLASSES))
    except (RuntimeError, NotImplementedError):
        pass  # some compute while they are built; the whole one is looked at again
    resized = (
        [({"img_size": size}, size) for size in SIZES[:2]] if pretrained.fixed_input_size else []
    )
    model, built_with = None, None
    for keywords, size in (*resized, *(({}, size) for size in (*SIZES, native))):
        try:
            if model is None or built_with != keywords:
                model = timm.create_model(name, num_classes=CLASSES, **keywords).eval()
                built_with = keywords
            images = torch.randn(BATCH, channels, size, size)
            with torch.no_grad():
                model(images)
                torch.manual_seed(0)
            return Case(model, (images,))
        except Exception as problem:  # the next size may do
            last = problem
    raise last


def build_without_values(zoo: str, name: str) -> nn.Module:
    """Return an architecture on the meta device, or with values where it computes with them."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                if zoo == "timm":
                    return timm.create_model(name, num_classes=CLASSES)
                return torchvision.models.get_model(name, **_weightless(name)[1])
        except (RuntimeError, NotImplementedError) as problem:
            last = problem
    raise last


def _weightless(name: str) -> tuple[str, dict[str, Any]]:
    """Return the module of a builder of torchvision's, and what keeps it from a download."""
    builder = torchvision.models.get_model_builder(name).__module__
    keywords: dict[str, Any] = {"weights": None}
    if "detection" in builder or "segmentation" in builder:
        keywords["weights_backbone"] = None
    if "googlenet" in name or "inception" in name:
        keywords["init_weights"] = False  # which takes a minute
    return builder, keywords


def _build_torchvision(name: str) -> Case:
    models = torchvision.models
    builder, keywords = _weightless(name)
    if "detection" in builder:
        keywords |= {"num_classes": CLASSES, "min_size": 96, "max_size": 128}
        if "ssd" in name:
            keywords = {k: v for k, v in keywords.items() if "size" not in k}
        images = [torch.rand(3, 96, 96), torch.rand(3, 96, 128)]
        return Case(models.get_model(name, **keywords), (images,),
                    training_arguments=(images, [_objects() for _ in images]))  # fmt: skip
    if "optical_flow" in builder:
        pair = (torch.rand(BATCH, 3, 128, 128), torch.rand(BATCH, 3, 128, 128))
        return Case(models.get_model(name, **keywords), pair, {"num_flow_updates": 2})
    model = models.get_model(name, **keywords).eval()
    for shape in _shapes("video" in builder):
        images = torch.randn(BATCH, 3, *shape)
        try:
            with torch.no_grad():
                model(images)
            return Case(model, (images,))
        except Exception as problem:  # the next size may do
            last = problem
    raise last


def _shapes(video: bool) -> Iterator[tuple[int, ...]]:
    for size in (*SIZES, 299):
        yield (16, size, size) if video else (size, size)


def _objects() -> dict[str, torch.Tensor]:
    """Return the two objects on an image, with all that one of torchvision's detectors asks for."""
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 30.0, 90.0, 80.0]])
    keypoints = torch.cat([boxes.new_full((2, 17, 2), 40.0), boxes.new_ones(2, 17, 1)], 2)
    masks = torch.ones(2, 96, 128, dtype=torch.uint8)
    return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}


def _build_hugging_face(name: str) -> Case:
    known = HUGGING_FACE[name]
    config = AutoConfig.for_model(
        name, **({} if "config" in str(known) or known is STAGES else TINY) | known
    )
    model = AutoModel.from_config(config)
    words = torch.randint(3, 99, (BATCH, 16))
    pixels = torch.randn(BATCH, 3, 32, 32)
    inputs = {"input_ids": words}
    if name in ("vit", "dinov2", "convnext", "resnet"):
        inputs = {"pixel_values": pixels}
    elif name == "clip":
        inputs["pixel_values"] = pixels
    elif name in ("t5", "bart"):
        inputs["decoder_input_ids"] = words
    elif name == "wav2vec2":
        inputs = {"input_values": torch.randn(BATCH, 800)}
    return Case(model, (), inputs)

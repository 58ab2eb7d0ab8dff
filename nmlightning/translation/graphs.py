"""Translation networks as two graphs: the encoder, and the greedy step with its cache."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmlightning.errors import InputError
from nmlightning.export.examples import largest_difference
from nmlightning.export.export import READERS, ExportReport, export_network
from nmlightning.export.formats import FORMATS, check_target
from nmlightning.export.half_safe import Evaluation, make_half_safe
from nmlightning.translation.decoding import greedy_search
from nmlightning.translation.lstm import AttentionLSTM
from nmlightning.translation.tokenizer import EOS, PAD
from nmlightning.translation.transformer import Transformer

_SOURCES, _WRITTEN = 4, 3  # sentences that are compared, and tokens in the cache of an example
_LENGTHS: dict[type, int] = {Transformer: 9, AttentionLSTM: 50}  # of sources
_GROWING = 5  # dimensions of a cache that grows
Graph = Callable[..., Sequence[Tensor]]


class EncoderGraph(nn.Module):
    """(N, S) tokens → what the steps read: dimension 1 of each is S."""

    def __init__(self, net: Transformer | AttentionLSTM) -> None:
        super().__init__()
        self.net = net

    def forward(self, source: Tensor) -> dict[str, Tensor]:
        memory, mask = self.net.encode(source)
        if isinstance(self.net, AttentionLSTM):
            return {"memory": memory, "mask": mask.flatten(1)}
        pairs = [x.source_attention.keys_and_values(memory) for x in self.net.decoder]  # type: ignore[operator, union-attr]
        keys, values = zip(*pairs, strict=True)
        return {
            "source_keys": _pack(keys),
            "source_values": _pack(values),
            "mask": mask.flatten(1),
        }


class StepGraph(nn.Module):
    """(N,) tokens and the cache → the next (N, vocab_size) logits, and the cache after them.

    Of a Transformer the cache is keys and values, (N, T, layers, heads, d), T tokens so far; of an
    LSTM h and c, (N, layers, width). The rest is what the encoder gives.
    """

    def __init__(self, net: Transformer | AttentionLSTM) -> None:
        super().__init__()
        self.net = net

    def empty_cache(self, rows: int) -> dict[str, Tensor]:
        """Return the cache before the first token."""
        weight = self.net.words.target.weight
        if isinstance(self.net, AttentionLSTM):
            shape = (rows, 1 + len(self.net.decoder), weight.shape[1])
            return {"h": weight.new_zeros(shape), "c": weight.new_zeros(shape)}
        heads: int = self.net.decoder[0].attention.heads  # type: ignore[assignment, union-attr]
        shape = (rows, 0, len(self.net.decoder), heads, self.net.width // heads)  # type: ignore[assignment]
        return {"keys": weight.new_zeros(shape), "values": weight.new_zeros(shape)}

    def forward(self, token: Tensor, mask: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        if isinstance(self.net, AttentionLSTM):
            cells: Any = [
                tuple(cache[x][None, :, i].contiguous() for x in "hc")
                for i in range(cache["h"].shape[1])
            ]
            given = (cache["memory"], mask[:, None], cells)
            logits, after = self.net._write(token[:, None], *given)
            states = zip("hc", zip(*after, strict=True), strict=True)
            new = {f"new_{x}": torch.cat(parts).transpose(0, 1) for x, parts in states}
            return {"logits": logits[:, 0], **new}
        state: Any = _GrowingState(mask, **cache)
        logits = self.net.next_logits(token, state)
        return {"logits": logits, "new_keys": _pack(state.keys), "new_values": _pack(state.values)}


class _GrowingState:
    """A `TransformerState` of tensors that grow, as a graph needs it."""

    def __init__(
        self, mask: Tensor, keys: Tensor, values: Tensor, source_keys: Tensor, source_values: Tensor
    ) -> None:
        self.keys, self.values = _unpack(keys), _unpack(values)
        self.source = list(zip(_unpack(source_keys), _unpack(source_values), strict=True))
        self.mask, self.length = mask[:, None, None], keys.shape[1]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer] = torch.cat((self.keys[layer], keys), 2)
        self.values[layer] = torch.cat((self.values[layer], values), 2)
        return self.keys[layer], self.values[layer]


def _pack(layers: Sequence[Tensor]) -> Tensor:
    """Return (N, T, layers, heads, d) of (N, heads, T, d) of each layer."""
    return torch.stack(tuple(layers), 2).permute(0, 3, 2, 1, 4)


def _unpack(cache: Tensor) -> list[Tensor]:
    return list(cache.permute(2, 0, 3, 1, 4))


class _FileModel:
    """A `SequenceModel` of the two files, for one `greedy_search`, and its state."""

    training = False
    tensors: dict[str, Tensor]

    def __init__(self, encoder: Graph, step: Graph, graph: StepGraph, names: list[str]) -> None:
        self.vocab_size = graph.net.vocab_size
        self._encoder, self._step, self._graph, self._names = encoder, step, graph, names

    def begin(self, source: Tensor) -> "_FileModel":
        cache = self._graph.empty_cache(len(source))
        self.tensors = {**dict(zip(self._names, self._encoder(source), strict=True)), **cache}
        return self

    def next_logits(self, tokens: Tensor, state: "_FileModel") -> Tensor:
        logits, *after = self._step(tokens, *self.tensors.values())
        cache = list(self.tensors)[len(self._names) :]
        self.tensors |= dict(zip(cache, after, strict=True))
        return logits

    def select(self, rows: Tensor) -> None:
        self.tensors = {name: x[rows].contiguous() for name, x in self.tensors.items()}


def export_translator(
    net: nn.Module,
    file: Path,
    format: str,
    *,
    source_length: int | None = None,
    extra_length: int = 50,
    half_safe: str | None = None,
    evaluate: Evaluation | None = None,
    overwrite: bool = False,
) -> list[ExportReport]:
    """Write `NAME.encoder` and `NAME.step` beside each other, and decode greedily with both.

    The encoder of an LSTM takes sources of `source_length` tokens, by default 50, padded with 0 at
    their end: exporters unroll it. `half_safe` and `evaluate` are as in `export_network`, but
    norms are swapped in place; the last report has what was swapped in both.

    Raises:
        InputError: the network is another; a file that cannot be written, or is not right; other
            tokens than those of `greedy_search` with the network.
    """
    if not isinstance(net, Transformer | AttentionLSTM) or FORMATS[format].keeps_code:
        raise InputError(
            "nm export writes Transformer and AttentionLSTM as onnx or torch_export, got "
            f"{type(net).__name__} as {format}."
        )
    net = net.cpu().float().eval()
    files = [file.with_name(f"{file.stem}.{x}{file.suffix}") for x in ("encoder", "step")]
    for each in files:
        check_target(each, format, overwrite)
    encoder, step = EncoderGraph(net), StepGraph(net)
    source = _draw_sources(net.vocab_size, source_length or _LENGTHS[type(net)])
    safe = None
    if half_safe:
        run = evaluate or (lambda _: {})
        safe = make_half_safe(net, half_safe, run, lambda new, old: _compare(new, old, source))
    with torch.no_grad():
        read, cache = encoder(source), step.empty_cache(len(source))
    grows = [name for name, x in cache.items() if x.dim() == _GROWING]
    for name in grows:
        cache[name] = cache[name].new_ones(len(source), _WRITTEN, *cache[name].shape[2:])
    given = {"token": source[:, 0], **read, **cache}
    lengths = {**dict.fromkeys(read, "source"), **dict.fromkeys(grows, "written")}
    own = {} if isinstance(net, AttentionLSTM) else {"source": "sequence"}
    parts = ((encoder, {"source": source}, own), (step, given, lengths))
    with tempfile.TemporaryDirectory(prefix="nmlightning", dir=file.parent) as folder:
        drafts = [Path(folder) / each.name for each in files]
        reports = [
            export_network(part, draft, format, inputs=inputs, lengths=opened)
            for draft, (part, inputs, opened) in zip(drafts, parts, strict=True)
        ]
        read_back = [READERS[format](draft, net) for draft in drafts]
        model: Any = _FileModel(read_back[0], read_back[1], step, list(read))
        tokens = [greedy_search(x, source, extra_length=extra_length) for x in (net, model)]
        if tokens[0] != tokens[1]:
            raise InputError(f"the {format} does not translate as the network: nothing is written.")
        for draft, each in zip(drafts, files, strict=True):
            draft.replace(each)
    reports = [replace(x, file=each) for x, each in zip(reports, files, strict=True)]
    return [reports[0], replace(reports[1], half_safe=safe)]


@torch.no_grad()
def _compare(net: nn.Module, trained: nn.Module, source: Tensor) -> float:
    return largest_difference(net(source, source), trained(source, source))


def _draw_sources(vocab_size: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(EOS + 1, vocab_size, (_SOURCES, length), generator=generator)
    for row in range(_SOURCES):
        source[row, length - row * length // _SOURCES :] = PAD
    return source

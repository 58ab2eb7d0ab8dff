"""Speed of our Transformer: training against torch's layers, decoding with a cache and without.

    python benchmarks/translation.py [--layers 6] [--device cuda] [--rounds 10]

Training is a step of Adam on random tokens, a tenth of the sources padded, in ours and in the same
network of `nn.Transformer…` layers. Decoding is a beam search whose translations are all as long
as `--length` says; without a cache the decoder runs over all tokens anew for each one, but the
source is encoded once. Both take turns in random order in every round; a figure is the median over
rounds, a ratio that within a round, with its quartiles, so that a noisy machine disturbs both.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import Call, quartiles_of_ratio, time_rounds
from torch import Tensor, nn
from translation_rivals import TorchTransformer, UncachedDecoder

from nmlightning.models import Transformer, beam_search
from nmlightning.translation.tokenizer import EOS, PAD, SPECIAL_TOKENS


def main() -> None:
    """Print a line for training and one for decoding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        *(("vocab_size", 32_000), ("width", 512), ("hidden", 2048), ("heads", 8), ("layers", 6)),
        *(("batch", 32), ("length", 64), ("beam_batch", 8), ("beam_size", 4), ("rounds", 10)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("training", "decoding"))
    o = parser.parse_args()
    print(
        f"torch {torch.__version__}, {o.device}, {torch.get_num_threads()} threads, "
        f"{o.layers} + {o.layers} layers, {o.width}/{o.hidden}, {o.heads} heads"
    )
    torch.manual_seed(0)
    sizes = {"width": o.width, "hidden": o.hidden, "heads": o.heads}
    ours = Transformer(o.vocab_size, **sizes, encoder_layers=o.layers, decoder_layers=o.layers)
    theirs = TorchTransformer(o.vocab_size, **sizes, layers=o.layers)
    for net in (ours, theirs):
        net.to(o.device)
    if o.only != "decoding":
        nets = {"ours": ours, "torch's layers": theirs}
        steps = {name: make_step(net, o.batch, o.length) for name, net in nets.items()}
        report("training", steps, o.batch * o.length, o.device, o.rounds)
    if o.only != "training":
        nets = {"with cache": ours.eval(), "without": UncachedDecoder(ours).eval()}
        searches = {
            name: make_search(net, o.beam_batch, o.beam_size, o.length)
            for name, net in nets.items()
        }
        report("decoding", searches, o.beam_batch * o.length, o.device, o.rounds)


def make_step(net: nn.Module, batch: int, length: int) -> Call:
    """Return a step of training."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    source, target = draw_tokens(net, batch, length), draw_tokens(net, batch, length + 1)
    for row in range(0, batch, 2):
        source[row, -max(1, length // 5) :] = PAD

    def step() -> None:
        optimizer.zero_grad()
        logits = net(source, target[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def make_search(net: nn.Module, batch: int, beam_size: int, length: int) -> Call:
    """Return a search whose translations all have `length` tokens."""
    source = draw_tokens(net, batch, length)
    endless = Endless(net)

    def search() -> None:
        found = beam_search(endless, source, beam_size=beam_size, extra_length=0)
        assert {len(translation) for translation in found} == {length}

    return search


class Endless:
    """A sequence model that never writes EOS."""

    training = False

    def __init__(self, net: nn.Module) -> None:
        self.vocab_size: int = net.vocab_size  # type: ignore[assignment]
        self.begin: Callable[[Tensor], object] = net.begin  # type: ignore[assignment]
        self._next_logits: Callable[[Tensor, object], Tensor] = net.next_logits  # type: ignore[assignment]

    def next_logits(self, tokens: Tensor, state: object) -> Tensor:
        """As the net's, without a chance for EOS."""
        logits = self._next_logits(tokens, state)
        logits[:, EOS] = -torch.inf
        return logits


def draw_tokens(net: nn.Module, batch: int, length: int) -> Tensor:
    """Return (batch, length) random tokens that are words."""
    weight = next(q for q in net.parameters())
    return torch.randint(len(SPECIAL_TOKENS), len(weight), (batch, length), device=weight.device)


def report(what: str, calls: dict[str, Call], tokens: int, device: str, rounds: int) -> None:
    """Time both and print how many tokens a second each has, and the ratio of the first."""
    seconds = time_rounds(calls, rounds, device=device, warm_up=1)
    speeds = ", ".join(
        f"{name} {tokens / statistics.median(taken):.0f} tokens/s"
        for name, taken in seconds.items()
    )
    first, second = seconds
    print(
        f"{what}: {speeds}, ratio {quartiles_of_ratio(seconds, second, to=first).format()}",
        flush=True,
    )


if __name__ == "__main__":
    main()

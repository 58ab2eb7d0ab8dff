"""Padding and sentence pairs a second: batches by token count against a fixed number of pairs.

The fixed number is that which fills a batch with the same tokens on average, of shuffled pairs. In
every round an epoch of each is read, in random order, so that a noisy machine disturbs both. A
figure is the median over rounds, with its quartiles. Of the padding all PAD of both sides counts.
Of two neighbours in a batch the share that are neighbours in the next epoch, too, is printed last.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator

import tokenizers
import torch
from interleaved import quartiles_of, time_rounds

from nmlightning.datamodules import ParallelText
from nmlightning.translation.batches import ShuffledBatches
from nmlightning.translation.corpus import EncodedPairs, TranslationBatch
from nmlightning.translation.tokenizer import PAD


def main() -> None:
    """Read the options, and print a line for each kind of batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a text file, plain or gzipped, one sentence a line")
    parser.add_argument("target", help="its translation")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--tokens_a_batch", type=int, default=25000)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    files, tokens = [options.source, options.target], options.tokens_a_batch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        data = ParallelText(
            files, files, vocab_size=options.vocab_size, tokens_a_batch=tokens, root=root
        )
        start = time.perf_counter()
        data.prepare_data()
        prepared = time.perf_counter() - start
        data.setup("fit")
    assert data.train is not None
    pairs = data.train
    average = sum(side.mean() for side in pairs.padded_lengths()) / 2
    fixed = max(1, round(tokens / average))
    print(
        f"tokenizers {tokenizers.__version__}, torch {torch.__version__}, {options.rounds} rounds"
    )
    print(f"{pairs.length} pairs, {average:.1f} tokens a side; prepared in {prepared:.1f} s")
    loader = data.train_dataloader()
    kinds = {
        f"{tokens} tokens a batch": lambda: iter(loader),
        f"{fixed} pairs a batch": lambda: read_shuffled(pairs, fixed),
    }
    reads = {kind: lambda read=read: sum(1 for _ in read()) for kind, read in kinds.items()}
    for kind, times in time_rounds(reads, options.rounds, warm_up=0).items():
        low, middle, high = quartiles_of([pairs.length / seconds for seconds in times])
        batches = list(kinds[kind]())
        largest, padding = measure(batches)
        print(
            f"{kind:22} {len(batches):6} batches, the largest of {largest} tokens a side, "
            f"{padding:6.2%} padding, {middle:9,.0f} pairs/s ({low:,.0f} to {high:,.0f})"
        )
    together = share_that_meets_again(loader.sampler, pairs.length)
    print(f"{together:.0%} of the neighbours in a batch are neighbours in the next epoch, too")


def share_that_meets_again(order: ShuffledBatches, pairs: int) -> float:
    """Return the share of all two pairs in a batch of one epoch that share a batch of the next."""
    batch_of = torch.zeros(2, pairs, dtype=torch.int64)
    for epoch in range(2):
        order.set_epoch(epoch)
        for number, rows in enumerate(order):
            batch_of[epoch, rows] = number
    sizes = torch.bincount(batch_of[0]).double()
    both = torch.unique(batch_of, dim=1, return_counts=True)[1].double()
    return float((both * (both - 1)).sum() / (sizes * (sizes - 1)).sum())


def read_shuffled(pairs: EncodedPairs, size: int) -> Iterator[TranslationBatch]:
    """Yield batches of `size` pairs, whatever their lengths."""
    for rows in torch.randperm(pairs.length).split(size):
        yield pairs.batch(rows)


def measure(batches: list[TranslationBatch]) -> tuple[int, float]:
    """Return the tokens of the largest side, padding included, and the part that is PAD."""
    sides = [side for batch in batches for side in (batch.source, batch.target)]
    tokens = [side.numel() for side in sides]
    return max(tokens), sum(int((side == PAD).sum()) for side in sides) / sum(tokens)


if __name__ == "__main__":
    main()

"""Images a second that one process reads, decodes and crops, from folders and from shards.

In every round one batch of each root is timed, in random order, so that a noisy machine disturbs
all. A figure is the median over rounds, with its quartiles.
"""

import argparse
import random
import resource
import statistics
import time
from itertools import chain, repeat

import PIL
import torch

from nmlightning.datamodules import ImageNet


def main() -> None:
    """Read the options, and print a line for each root."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="+", help="as --data.root of nm fit")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    loaders = {}
    for root in options.root:
        data = ImageNet(root, options.batch, num_workers=0, image_size=options.image_size)
        data.setup("fit")
        loaders[root] = chain.from_iterable(repeat(data.train_dataloader()))
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, {options.rounds} rounds")
    speeds: dict[str, list[float]] = {root: [] for root in loaders}
    for round_number in range(-1, options.rounds):  # the first warms up
        for root in random.sample(list(loaders), len(loaders)):
            start = time.perf_counter()
            images = len(next(loaders[root]).labels)
            if round_number >= 0:
                speeds[root].append(images / (time.perf_counter() - start))
    for root, measured in speeds.items():
        low, middle, high = statistics.quantiles(measured, n=4)
        print(f"{root:40} {middle:7.1f} images/s ({low:.1f} to {high:.1f})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{peak / 1024:.0f} MB at most, of all together")


if __name__ == "__main__":
    main()

"""Images a second that one process reads, decodes and crops, from folders and from shards.

One batch of each root is timed in every round (see `interleaved`).
"""

import argparse
import resource
from functools import partial
from itertools import chain, repeat

import PIL
import torch
from interleaved import Call, quartiles_of, time_rounds

from nmlightning.datamodules import ImageNet


def main() -> None:
    """Read the options, and print a line for each root."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="+", help="as --data.root of nm fit")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    reads: dict[str, Call] = {}
    images: dict[str, int] = {}
    for root in options.root:
        data = ImageNet(root, options.batch, num_workers=0, image_size=options.image_size)
        data.setup("fit")
        images[root] = data.images_a_batch(processes=1)
        reads[root] = partial(next, chain.from_iterable(repeat(data.train_dataloader())))
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}, {options.rounds} rounds")
    for root, times in time_rounds(reads, options.rounds, warm_up=1).items():
        slow, middle, fast = quartiles_of([images[root] / seconds for seconds in times])
        print(f"{root:40} {middle:7.1f} images/s ({slow:.1f} to {fast:.1f})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{peak / 1024:.0f} MB at most, of all together")


if __name__ == "__main__":
    main()

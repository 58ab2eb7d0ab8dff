"""`nm shard`: writes a folder of images as shards, which ImageNet reads and streams."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from nmlightning.atomic_file import draft_of, replace_folder
from nmlightning.commands.argument_parser import ArgumentParser, print_line, progress_bar
from nmlightning.datamodules.decoded_images import Damaged
from nmlightning.datamodules.image_folder import FolderImages, common_classes
from nmlightning.datamodules.image_shards import ShardWriter
from nmlightning.errors import InputError, check_whole_number

PARTS = ("train", "val")


def run(arguments: list[str]) -> int:
    given = _parse(arguments)
    check_whole_number("--shard_size", given.shard_size)
    folders = {part: given.imagefolder / part for part in PARTS}
    for folder in folders.values():
        if given.out.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{given.out} is inside {folder}, where it would be taken for images: name a "
                "folder elsewhere."
            )
    common_classes(*folders.values())
    parts = {part: FolderImages(folder, given.damaged) for part, folder in folders.items()}
    bar = progress_bar("{task.description}")
    with _new_folder(given.out.absolute()) as unfinished, bar as progress:
        writer = ShardWriter(unfinished, given.shard_size, given.damaged)
        for part, images in parts.items():
            task = progress.add_task(part, total=images.length)
            writer.write(images, part, partial(progress.advance, task))
        writer.write_index(parts["train"].classes)
    _print_result(writer, given.out)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="nm shard",
        description="Write train and val, a folder of images for each class, as shards that "
        "--data.root of ImageNet reads: the same files, many in one, to copy and to stream.",
    )
    parser.add_argument("imagefolder", type=Path, help="the folder that holds train and val")
    parser.add_argument("out", type=Path, help="the folder to write, which does not exist yet")
    parser.add_argument(
        "--damaged",
        choices=get_args(Damaged),
        default="error",
        help="what to do with damaged images and other files (default: %(default)s)",
    )
    parser.add_argument(
        "--shard_size", type=int, default=64, help="images a shard (default: %(default)s)"
    )
    return parser.parse_args(arguments)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` at the end, and is deleted if that is not reached."""
    _refuse_full(out)
    draft = draft_of(out)
    with replace_folder(out, draft):
        (draft / out.name).mkdir()
        yield draft / out.name
        _refuse_full(out)  # another nm shard may have been faster


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something already: name a folder that does not exist yet.")


def _print_result(writer: ShardWriter, out: Path) -> None:
    for part, images in writer.images.items():
        print_line(part, f"{images} images in {-(-images // writer.shard_size)} shards")
    if writer.skipped:
        print_line("skipped", f"damaged images, {len(writer.skipped)} in all:")
        for name, reason in writer.skipped.items():
            print_line("", f"{name} ({reason})")
    print_line("shards", f"{out}: give it to ImageNet as --data.root")

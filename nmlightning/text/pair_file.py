"""The file of encoded pairs: written once, then mapped into memory by every process."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nmlightning.text.encoded_pairs import EncodedPairs, EncodedSide, Omissions

FORMAT = "nmlightning sentence pairs 1"
SIDES = ("source", "target")


def write_pairs(path: Path, pairs: EncodedPairs) -> None:
    """Write the file at once or not at all, so that a reader never finds half of it."""
    arrays: dict[str, Any] = {"words": pairs.words}
    for name, side in zip(SIDES, (pairs.source, pairs.target), strict=True):
        arrays |= {f"{name}/tokens": side.tokens, f"{name}/bounds": side.bounds}
    metadata = {
        "format": FORMAT,
        "digest": pairs.digest,
        "omitted": json.dumps(pairs.omitted._asdict()),
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(arrays, unfinished, metadata)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_pairs(path: Path) -> EncodedPairs | None:
    """Return the pairs, their tokens in the file until they are used; None if it is damaged.

    Only the file's length and structure are looked at: `is_intact` of what is returned reads all.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    source, target = (
        EncodedSide(arrays[f"{name}/tokens"], arrays[f"{name}/bounds"]) for name in SIDES
    )
    omitted = Omissions(**json.loads(metadata["omitted"]))
    return EncodedPairs(source, target, arrays["words"], omitted, metadata["digest"])

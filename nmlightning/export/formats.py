"""The formats that a network can be written in, known without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nmlightning.errors import InputError, check_choice, check_flag


@dataclass(frozen=True)
class Format:
    """A format: its files' suffix, and the line of Python that uses the file called {file}."""

    suffix: str
    use: str
    needs_suffix: bool = False  # a file of another is not read
    keeps_code: bool = False  # its reader has the network's class, so that keys and classes count
    needs: tuple[str, ...] = ()  # packages that no other format needs


HALF_SAFE = ("scaled", "l1")  # the norms of `half_safe`
FORMATS: Mapping[str, Format] = {
    "state_dict": Format(
        ".pt", "net.load_state_dict(torch.load({file!r}, weights_only=True))", keeps_code=True
    ),
    "onnx": Format(
        ".onnx",
        "onnxruntime.InferenceSession({file!r}).run(None, {{{feed}}})",
        needs=("onnx", "onnxscript"),
    ),
    "torch_export": Format(
        ".pt2", "torch.export.load({file!r}).module()({names})", needs_suffix=True
    ),
}


def file_size(size: int) -> str:
    """Return a number of bytes in words, such as "1.5 MB"."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def check_target(file: Path, format: str, overwrite: bool) -> None:
    """Raise InputError if there is no such format, it needs more, or the file cannot be written."""
    check_choice("format", format, FORMATS)
    absent = [package for package in FORMATS[format].needs if find_spec(package) is None]
    if absent:
        raise InputError(
            f"the format {format} needs {' and '.join(absent)}: pip install {' '.join(absent)}."
        )
    check_flag("overwrite", overwrite)
    suffix = FORMATS[format].suffix
    if FORMATS[format].needs_suffix and file.suffix != suffix:
        raise InputError(f"a file of {format} must end in {suffix}, got {str(file)!r}.")
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {str(file.parent)!r} to write {file.name!r} into.")
    if file.is_dir():
        raise InputError(f"{str(file)!r} is a folder; name a file in it.")
    if file.exists() and not overwrite:
        raise InputError(
            f"{str(file)!r} exists already; name another file, or give overwrite=True "
            "(--overwrite)."
        )

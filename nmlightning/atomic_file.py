"""Files that take the place of an older one at once, or not at all."""

import glob
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from nmlightning.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted
    fcntl = None  # type: ignore[assignment]

_DRAFT = ".unfinished"


class UnwritableError(InputError, OSError):
    """A file cannot be written, for a reason that the system gave, such as a full disk."""


@contextmanager
def replace_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a draft that becomes the file `path` at the end, once it is on the disk.

    Its mode follows from the umask. Whoever is killed on the way leaves the file that was there
    before, and a draft, which the next writer of the file deletes, or `remove_drafts`.

    Raises:
        UnwritableError: what was written met an OSError; the earlier file is whole.
    """
    path = Path(path)
    with explain_failure(path):
        earlier = path.exists()
        if "\0" in str(path) or (earlier and not path.is_file()):
            raise UnwritableError(f"{path} cannot be written: it is not a file name.")
    draft = draft_of(path)
    with explain_failure(path, f"; the earlier {path.name} is intact" if earlier else ""):
        try:
            remove_drafts(path.parent, glob.escape(path.name))
            with draft.open("xb") as file:
                _lock(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, path)
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                draft.unlink()
        _sync(path.parent)


@contextmanager
def replace_folder(path: Path, draft: Path) -> Iterator[None]:
    """Make the folder `draft`; what of the name of `path` is in it at the end becomes that.

    Two folders cannot be exchanged at once. Whoever is killed between leaves the earlier one whole,
    with a name that begins with `earlier-`.

    Raises:
        UnwritableError: as `replace_file`.
    """
    earlier = path.with_name(f"earlier-{path.name}")
    with explain_failure(path, f"; the earlier {path.name} is intact" if path.exists() else ""):
        remove_drafts(path.parent, glob.escape(path.name))
        draft.mkdir(parents=True)
        try:
            with _opened(draft) as folder:
                _lock(folder)
                yield
            for file in draft.rglob("*"):
                _sync(file)
            if path.exists():
                _remove(earlier)
                path.rename(earlier)
            (draft / path.name).rename(path)
            _sync(path.parent)
            _remove(earlier)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def is_whole_zip(file: Path | BinaryIO) -> bool:
    """Return whether all checksums in a file as `torch.save` writes it are right."""
    try:
        with zipfile.ZipFile(file) as content:
            return content.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        return False  # a flipped bit may ask for a compression or an encryption


def draft_of(path: Path) -> Path:
    """Return a new name beside `path`, by which `remove_drafts` finds what is left of it."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}{_DRAFT}")


@contextmanager
def explain_failure(path: Path, fate: str = "") -> Iterator[None]:
    """Turn an OSError of the body, or one behind what torch or safetensors raise, into a line.

    `torch.distributed.checkpoint` raises what is no Exception, with those of the ranks in it.
    """
    try:
        yield
    except BaseException as error:
        of_ranks = list(getattr(error, "failures", {}).values())
        if not (of_ranks or isinstance(error, Exception)):
            raise
        cause: BaseException | None = of_ranks[0][0] if of_ranks else error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, InputError) or not (cause or of_ranks):
            raise
        reason = cause.strerror or cause if cause else of_ranks[0][0]  # which came without a cause
        raise UnwritableError(f"{path} cannot be written: {reason}{fate}.") from error


def remove_drafts(folder: Path, name: str = "*", *, below: bool = False) -> list[Path]:
    """Delete the drafts in a folder, or also below it, that no process is still writing."""
    pattern = f".{name}.*{_DRAFT}"
    found = folder.rglob(pattern) if below else folder.glob(pattern)
    left = [draft for draft in found if _is_left(draft)]
    for draft in left:
        _remove(draft)
    return left


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _lock(file: int) -> bool:
    """Lock a file, until it is closed or its process ends; False if another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or on a file system without locks, where nothing is known
            return False
    return True


def _is_left(draft: Path) -> bool:
    with suppress(OSError), _opened(draft) as file:
        return _lock(file)
    return False


def _sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk, where the file system knows how."""
    with suppress(OSError), _opened(path) as file:
        os.fsync(file)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def next_version(folder: Path) -> Path:
    """Return `version_N` in a folder, after all that exist there, as Lightning's loggers count."""
    taken = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    number = max((int(version) for version in taken if version.isdigit()), default=-1) + 1
    return folder / f"version_{number}"

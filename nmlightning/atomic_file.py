"""Files that take the place of an older one at once, or not at all."""

import glob
import os
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
            raise UnwritableError(f"{path} cannot be written: it is no name of a file.")
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}{_DRAFT}")
    with explain_failure(path, f"; the earlier {path.name} is whole" if earlier else ""):
        try:
            remove_drafts(path.parent, glob.escape(path.name))
            with draft.open("xb") as file:
                _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, path)
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                draft.unlink()
        _sync_folder(path.parent)


@contextmanager
def explain_failure(path: Path, fate: str = "") -> Iterator[None]:
    """Turn an OSError of the body, or one behind what torch or safetensors raise, into a line."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(error, InputError):
            raise
        raise UnwritableError(
            f"{path} cannot be written: {cause.strerror or cause}{fate}."
        ) from error


def remove_drafts(folder: Path, name: str = "*", *, below: bool = False) -> list[Path]:
    """Delete the drafts in a folder, or also below it, that no process is writing any more."""
    pattern = f".{name}.*{_DRAFT}"
    found = folder.rglob(pattern) if below else folder.glob(pattern)
    left = [draft for draft in found if _is_left(draft)]
    for draft in left:
        draft.unlink(missing_ok=True)
    return left


def _lock(file: BinaryIO) -> bool:
    """Lock a file, until it is closed or its process ends; False if another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or on a file system without locks, where nothing is known
            return False
    return True


def _is_left(draft: Path) -> bool:
    with suppress(OSError), draft.open("rb") as file:
        return _lock(file)
    return False


def _sync_folder(folder: Path) -> None:
    """Have the folder's entry on the disk, too, where its file system knows how."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)

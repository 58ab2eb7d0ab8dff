"""Files that are replaced: by umask, whole after a kill or on a full disk, and no draft left."""

import errno
import os
import resource
import signal
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from nmlightning.atomic_file import UnwritableError, remove_drafts, replace_file
from nmlightning.callbacks import AtomicCheckpointIO
from nmlightning.callbacks.checkpoints import replace_whole
from nmlightning.errors import InputError
from scripts import run_python

WRITE_UNTIL_KILLED = """
import os, signal
from nmlightning.atomic_file import replace_file
with replace_file("a.bin") as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replace_file_by_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replace_file(tmp_path / "a [1].bin") as file:
            file.write(b"content")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["a [1].bin"]
    assert (tmp_path / "a [1].bin").stat().st_mode & 0o777 == 0o640


def test_killed_writer_leaves_the_old_file_and_a_draft_for_the_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "a.bin").write_bytes(b"old")
    run_python("-c", WRITE_UNTIL_KILLED, cwd=run, code=-signal.SIGKILL)
    assert (run / "a.bin").read_bytes() == b"old"
    assert len(names(run)) == 2
    with replace_file(run / "b.bin"):
        assert len(remove_drafts(tmp_path, below=True)) == 1, "but for b's, being written"
    assert names(run) == ["a.bin", "b.bin"]


def test_full_disk_is_a_line_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path, io = tmp_path / "deep" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UnwritableError, match=r"last.ckpt cannot be written: .*; the earlier"):
            io.save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert io.load_checkpoint(path) == {"step": 1}
    assert names(path.parent) == ["last.ckpt"]


class Killed(BaseException):
    """What ends a process at once."""


class FoldersOfRanks:
    """The only one of the ranks of a strategy that writes a folder, and may not come to the end."""

    is_global_zero, error = True, None

    def broadcast(self, value: Path) -> Path:
        return value

    def barrier(self) -> None:
        pass

    def save_checkpoint(self, step: int, path: Path, _: None) -> None:
        path.mkdir()
        (path / "__0_0.distcp").write_text(str(step))
        if self.error is not None:
            raise self.error


def test_folder_of_ranks_replaces_the_last_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, path = FoldersOfRanks(), tmp_path / "last.ckpt"
    replace_whole(strategy)
    for step in (1, 2):
        strategy.save_checkpoint(step, path, None)
    full = CheckpointException("", {0: (OSError(errno.ENOSPC, "No space left on device"), None)})
    said = "No space left on device; the earlier last.ckpt is intact"
    lost = CheckpointException("", {1: (RuntimeError("unexpected pos 704 vs 598"), None)})
    errors = {
        full: (UnwritableError, said),
        lost: (UnwritableError, "pos 704"),
        Killed(): (Killed, ""),
    }
    for error, (expected, words) in errors.items():
        strategy.error = error
        with pytest.raises(expected, match=words or None):
            strategy.save_checkpoint(3, path, None)
        assert names(tmp_path) == ["last.ckpt"]
        assert (path / "__0_0.distcp").read_text() == "2"
    strategy.error, rename = None, Path.rename

    def rename_the_earlier(one: Path, other: Path) -> None:
        if other == path:
            raise Killed
        rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_the_earlier)
        with pytest.raises(Killed):
            strategy.save_checkpoint(4, path, None)
    assert names(tmp_path) == ["earlier-last.ckpt"]
    strategy.save_checkpoint(5, path, None)
    assert names(tmp_path) == ["last.ckpt"]


def test_each_address_is_its_own_checkpoint(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in "aba":
            io.save_checkpoint({"of": name}, tmp_path / name / "last.ckpt")
            assert io.load_checkpoint(f"{address}/{name}/last.ckpt") == {"of": name}
        io.save_checkpoint({"of": "later"}, tmp_path / "a" / "last.ckpt")
        assert io.load_checkpoint(f"{address}/a/last.ckpt") == {"of": "later"}
        with pytest.raises(InputError, match=r"/c/last.ckpt cannot be read: HTTP Error 404"):
            io.load_checkpoint(f"{address}/c/last.ckpt")
        content = (tmp_path / "b" / "last.ckpt").read_bytes()
        flipped = content.replace(b"of", b"og", 1)
        (tmp_path / "b" / "last.ckpt").write_bytes(flipped)
        with pytest.raises(InputError, match=r"/b/last.ckpt is damaged: a checksum is wrong"):
            io.load_checkpoint(f"{address}/b/last.ckpt")
        torch.save(tmp_path, tmp_path / "object.ckpt")
        with pytest.raises(InputError, match=r"/object.ckpt holds objects, which are not"):
            io.load_checkpoint(f"{address}/object.ckpt")
        server.shutdown()


def test_errors_of_the_body_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replace_file(tmp_path / "a"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", [".", "/", "/dev/null", "a\0b", 300 * "x", "/dev/null/x"])
def test_only_files_are_replaced(path: str) -> None:
    reason = "cannot be written: .*(not a file name|too long|Not a directory)"
    with pytest.raises(UnwritableError, match=reason), replace_file(path):
        pass
    assert Path("/dev/null").is_char_device()

"""Test what a process of several does; test_fit_on_ranks.py starts real ones."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from nmlightning.cli import main
from nmlightning.commands import failures
from nmlightning.commands.argument_parser import LOST_PROCESS
from nmlightning.commands.failures import failing_together, is_loss
from nmlightning.commands.fit import SameStart, check_restarts, standard_callbacks
from nmlightning.errors import InputError

GLOO = "[…/gloo/transport/tcp/pair.cc:561] "
LOSSES = [
    *map(RuntimeError, (f"{GLOO}Connection closed by peer [127.0.0.1]:1", "Application timeout")),
    RuntimeError(f"{GLOO}Read error [127.0.0.1]:1: Connection reset by peer"),
    RuntimeError("[…/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9ms for recv"),
    dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    dist.DistStoreError("Timed out after 9 seconds waiting for clients. 1/2 clients joined."),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("http://data: Connection reset by peer"),
    InputError("gloo: Timed out waiting"),
    ConnectionResetError("gloo: Connection reset by peer"),
    KeyboardInterrupt(),
]


def make_trainer(ranks: int = 2, launched: Any = ()) -> Any:
    launcher = SimpleNamespace(procs=list(launched))
    strategy = SimpleNamespace(launcher=launcher)
    return SimpleNamespace(world_size=ranks, global_rank=1, strategy=strategy)


@pytest.mark.parametrize("error", LOSSES)
def test_failing_together_reports_a_lost_process(
    error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(SystemExit) as stop,
        failing_together(make_trainer(), lambda: Path("a.ckpt")),
    ):
        raise error
    assert stop.value.code == LOST_PROCESS
    assert capfd.readouterr().err.splitlines() == [
        f"nm (rank 1): lost another process, which may have said why. Here: {error}",
        "nm (rank 1): the last checkpoint is a.ckpt.",
    ]


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_failing_together_keeps_other_errors(error: BaseException) -> None:
    assert not is_loss(error)
    with pytest.raises(type(error)) as raised, failing_together(make_trainer(), lambda: None):
        raise error
    assert raised.value is error


def test_failing_together_with_one_process() -> None:
    with pytest.raises(RuntimeError), failing_together(make_trainer(ranks=1), lambda: None):
        raise LOSSES[0]


@pytest.mark.parametrize("patience", [0, 10])
def test_failing_together_ends_launched_processes(
    patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "SECONDS_TO_END", patience)
    seconds = 60 if patience == 0 else 0.1
    command = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
    process = subprocess.Popen(command)
    with (
        pytest.raises(ZeroDivisionError),
        failing_together(make_trainer(1, [process]), lambda: None),
    ):
        raise ZeroDivisionError
    assert process.wait(timeout=10) == (-9 if patience == 0 else 0)


@pytest.mark.parametrize(
    ("given", "keeps"),
    [
        ({}, True),
        ({"every_n_train_steps": 2}, True),
        ({"every_n_train_steps": 2, "save_top_k": 0, "save_last": True}, True),
        ({"monitor": "x", "save_last": True}, True),
        ({"monitor": "x"}, False),
        ({"save_weights_only": True}, False),
        ({"save_weights_only": True, "save_last": True}, False),
        ({"save_top_k": 0}, False),
        ({"save_top_k": 0, "save_last": True}, False),
        ({"every_n_epochs": 0}, False),
    ],
)
def test_last_checkpoint_is_added_to_those_that_do_not_keep_it(
    given: dict[str, Any], keeps: bool
) -> None:
    mine = ModelCheckpoint(**given)
    options = Namespace(callbacks=mine, barebones=False, enable_progress_bar=False)
    added = standard_callbacks(Namespace(**vars(options), enable_checkpointing=None))
    names = [c.filename for c in added if isinstance(c, ModelCheckpoint)]
    assert names == ["last"] * (not keeps)
    Trainer(callbacks=[mine, *added], logger=False, enable_progress_bar=False)


@pytest.mark.parametrize("found", [["a.ckpt", "a.ckpt"], ["a.ckpt", None], ["a.ckpt", "b.ckpt"]])
def test_same_start_compares_checkpoints(
    found: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(answers: list[str | None], mine: str | None) -> None:
        assert mine == found[1]
        answers[:] = found

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    start, module = SameStart(found[1]), SimpleNamespace()
    if found[0] == found[1]:
        start.setup(make_trainer(), module, "fit")  # type: ignore[arg-type]
        return
    with pytest.raises(InputError, match=f"rank 0 starts from a.ckpt, rank 1 from {found[1]}: let"):
        start.setup(make_trainer(), module, "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("restarts", "shared", "notices"), [("1", "True", 1), ("1", "False", 0), ("0", "True", 0)]
)
def test_check_restarts_notices_those_that_cannot_work(
    restarts: str, shared: str, notices: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    check_restarts()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == notices
    assert all(line.endswith("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.") for line in lines)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
@pytest.mark.parametrize(("rank", "name"), [("0", "nm"), ("3", "nm (rank 3)")])
def test_error_names_the_process(
    variable: str, rank: str, name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv(variable, rank)
    assert main(["fitt"]) == 2
    assert capfd.readouterr().err.startswith(f"{name}: there is no command 'fitt'")

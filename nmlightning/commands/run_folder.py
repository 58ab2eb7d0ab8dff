"""Where a run is kept: `runs/<config name>/version_N`, never one that exists already."""

from pathlib import Path
from typing import Any

RUNS = Path("runs")
CHECKPOINTS = "checkpoints"  # Lightning's name


def folder_of_runs(config: Path | None, run_name: str) -> Path:
    """Return where earlier runs of an experiment are, of which `config` may be what one saved."""
    if config and config.name == "config.yaml" and (config.parent / CHECKPOINTS).is_dir():
        return config.parent.parent
    return RUNS / run_name


def last_checkpoint(runs: Path) -> Path | None:
    """Return the newest checkpoint in `runs` that is called last, as Lightning's keyword has it.

    Lightning looks in the folder of the new run, which with `nm` is always a new one.
    """
    found = runs.glob(f"version_*/{CHECKPOINTS}/*last*.ckpt")
    return max(found, key=time_written, default=None)


def time_written(checkpoint: Path) -> float:
    """Return when a checkpoint was last written, which may be a folder with a file of each rank."""
    return max(path.stat().st_mtime for path in (checkpoint, *checkpoint.glob("*")))


def config_of(checkpoint: Path) -> Path | None:
    """Return the config that the run of a checkpoint has saved, if it is where fit put both."""
    config = checkpoint.parent.parent / "config.yaml"
    return config if checkpoint.parent.name == CHECKPOINTS and config.is_file() else None


def default_logger(run_name: str) -> dict[str, Any]:
    """Return TensorBoard's logger as a config, which a later option may give another class."""
    # hp_metric would be a meaningless scalar of -1 in every run.
    arguments = {"save_dir": str(RUNS), "name": run_name, "default_hp_metric": False}
    return {"class_path": "pytorch_lightning.loggers.TensorBoardLogger", "init_args": arguments}


def new_version(run_name: str) -> Path:
    """Return `runs/<run_name>/version_N` after all that exist, as the loggers count them."""
    taken = [path.name.removeprefix("version_") for path in (RUNS / run_name).glob("version_*")]
    number = max((int(version) for version in taken if version.isdigit()), default=-1) + 1
    return RUNS / run_name / f"version_{number}"

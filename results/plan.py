"""The runs of plan.yaml, in the order in which they are made."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """A run of the plan with one of its seeds.

    Attributes:
        name: unique in the plan.
        seed: one of those of the plan.
        table: that it belongs to, a folder of `results`.
        settings: what the plan says of it.
    """

    name: str
    seed: int
    table: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def needs(self) -> list[str]:
        """The runs whose folders its options name, `$wd_on`."""
        names = re.findall(r"\$(\w+)", " ".join(self.settings["options"]))
        return [f"{name}-{self.seed}" for name in names]

    @property
    def stages(self) -> list[list[str]]:
        """The words of each command, to be run one after the other in the run's folder.

        Those before the options are `nm fit` and, where the plan has `test`, `nm test`, or else a
        script beside this file.
        """
        folders = {need.rpartition("-")[0]: f"../{need}" for need in self.needs}
        options = [
            word
            for text in self.settings["options"]
            for word in shlex.split(Template(text).substitute(folders))
        ]
        seed = ["--seed_everything", str(self.seed)]
        if "script" in self.settings:
            return [[f"{self.settings['script']}.py", *options, *seed]]
        words = ["--config", self.settings["config"], *seed, *options, "--ckpt_path", "last"]
        words += [
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.enable_model_summary",
            "false",
        ]
        stages = [["nm", "fit", *words, "--trainer.callbacks+=durable_curves.DurableCurves"]]
        if self.settings.get("test"):
            stages.append(["nm", "test", *words, "--trainer.logger", "CSVLogger"])
        return stages


def read_plan(file: Path = HERE / "plan.yaml") -> dict[str, Run]:
    """Return the runs by name and seed: the first seed of each, then the second of each, …"""
    tables = yaml.safe_load(file.read_text("utf-8"))["tables"]
    runs = [
        (place, Run(name, seed, table, settings))
        for table, content in tables.items()
        for name, settings in content["runs"].items()
        for place, seed in enumerate(settings["seeds"])
    ]
    by_name = {str(run): run for _, run in sorted(runs, key=lambda pair: pair[0])}
    if len(by_name) < len(runs):
        raise ValueError(f"{file}: a run is there twice.")
    return by_name

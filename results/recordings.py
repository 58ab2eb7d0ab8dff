"""What runs recorded of their layers, read from `recordings/`, and how near it is to theory."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SETTLED = 0.1  # a layer is at equilibrium once its angle is as near to the formula's, as a share
SMOOTHED = 3  # epochs
STEPS = 390  # an epoch of CIFAR-10 in batches of 128


class Recording:
    """What a run recorded of its layers; the last one, which is linear, is left out.

    Attributes:
        layers: their names, in the order of the network.
        columns: (T, L) of T epochs, by the columns of the CSV.
        finished: whether the run is kept, too.
    """

    def __init__(self, file: Path, finished: bool) -> None:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        names = list(dict.fromkeys(row["layer"] for row in rows))
        self.layers = names[:-1]
        self.columns = {
            column: np.array([float(row[column]) for row in rows]).reshape(-1, len(names))[:, :-1]
            for column in rows[0]
            if column != "layer"
        }
        self.finished = finished

    def __len__(self) -> int:
        return len(self.columns["epoch"])

    @property
    def epochs(self) -> NDArray[np.float64]:
        return np.arange(1, len(self) + 1)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """(T, L): the measured angle over that of the formula."""
        return self.columns["rotation"] / self.columns["equilibrium"]

    def mean_ratio(self, first: int, end: int | None = None) -> NDArray[np.float64]:
        """(L,): the same over some epochs, where angles are averaged as squares."""
        return np.sqrt(np.mean(self.ratio[first:end] ** 2, axis=0))


Recordings = dict[str, Recording]


def read_recordings(folder: Path, tables: dict[str, str]) -> Recordings:
    """Return those that exist of the first seed, by the names of runs.

    Args:
        folder: `results`.
        tables: of each run.
    """
    files = {name: folder / "recordings" / f"{name}-1.csv" for name in tables}
    return {
        name: Recording(file, (folder / tables[name] / f"{name}-1.json").is_file())
        for name, file in files.items()
        if file.is_file()
    }


def settled_epochs(ratio: NDArray[np.float64]) -> list[str]:
    """Return for each layer the epoch, from 1, from which on its ratio stays within `SETTLED`.

    The ratio is a mean over `SMOOTHED` epochs, and the epoch the middle one of them.
    """
    means = np.lib.stride_tricks.sliding_window_view(ratio, SMOOTHED, axis=0).mean(axis=2)
    far = abs(means - 1) > SETTLED
    last = [row.nonzero()[0].max(initial=-1) for row in far.T]
    return [str(n + 2 + SMOOTHED // 2) if n + 1 < len(means) else "not reached" for n in last]


def predicted_ratio(start: float, decay_rate: float, epochs: int) -> NDArray[np.float64]:
    """Return r over epochs, with 1 / r² − 1 falling as exp(−4 · rate · t): ‖w‖⁴ does so."""
    share = np.exp(-4 * decay_rate * STEPS * np.arange(epochs))
    return 1 / np.sqrt(1 + (1 / start**2 - 1) * share)


def layer_factors(run: Recording) -> NDArray[np.float64]:
    """(T, L): the largest factor that was logged, or else the largest (‖w(0)‖ / ‖w‖)²."""
    logged = run.columns["factor_max"]
    return run.columns["shrunk"] ** 2 if np.isnan(logged).all() else logged

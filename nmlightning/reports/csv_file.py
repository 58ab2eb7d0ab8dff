"""The scalars in a `metrics.csv` of Lightning's CSVLogger."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from nmlightning.errors import InputError
from nmlightning.reports.series import Point


def read_csv_file(file: Path) -> Iterator[Point]:
    """Yield the scalars.

    Raises:
        InputError: there is no column `step`, or something that is no number.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                step = int(row.pop("step"))
                for tag, text in row.items():
                    if text:
                        yield Point(tag, step, float(text), math.nan)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{file} is damaged, or not of Lightning's CSVLogger.") from error

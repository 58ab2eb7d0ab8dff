#!/usr/bin/env bash
# tensorboard 2.21.0: the custom scalars page loses charts of a category that a later run brings in.
#
# Expected: the layouts of all runs are merged: a category that several runs have holds the charts of
#   each, once. Runs with {A: a}, {B: b} and {B: c} give {A: a, B: b, c}.
# Seen: {A: a, B: b}. Only categories of the first run (by name) are extended by later ones; a category
#   that first appears in a later run keeps that run's charts alone. With the first run's layout given
#   {A: a, B: b}, chart c of another run is there.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'tensorboard==2.21.0' 'tensorboardX==2.6.5' 'setuptools<81' \
    'numpy==2.4.6'
cat >show.py <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
import urllib.request

import tensorboard.version
from tensorboardX import SummaryWriter


def merged(folder, *layouts):
    """The categories and charts that TensorBoard serves for runs with these layouts."""
    for run, layout in enumerate(layouts):
        with SummaryWriter(f"{folder}/run{run}") as writer:
            writer.add_custom_scalars(
                {category: {c: ["Multiline", [c]] for c in charts} for category, charts in layout.items()}
            )
            for charts in layout.values():
                for chart in charts:
                    writer.add_scalar(chart, 1.0, 0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
    served = subprocess.Popen(
        [*command, "--load_fast", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(60):
            time.sleep(1)
            address = f"http://localhost:{port}/data/"
            try:
                with urllib.request.urlopen(address + "runs") as answer:
                    if len(json.load(answer)) < len(layouts):
                        continue
                with urllib.request.urlopen(address + "plugin/custom_scalars/layout") as answer:
                    categories = json.load(answer)["category"]
            except OSError:
                continue
            return {c["title"]: [chart["title"] for chart in c["chart"]] for c in categories}
    finally:
        served.terminate()
    raise TimeoutError


print("tensorboard", tensorboard.version.VERSION)
late = merged("late", {"A": ["a"]}, {"B": ["b"]}, {"B": ["c"]})
early = merged("early", {"A": ["a"], "B": ["b"]}, {"B": ["c"]})
print("category B of a later run:", late)
print("category B of the first run:", early)
assert late == {"A": ["a"], "B": ["b"]} and early == {"A": ["a"], "B": ["b", "c"]}
PYTHON
venv/bin/python show.py

#!/usr/bin/env bash
# jsonargparse 4.53.0: a list of class instances that is given whole, after a config, is no new list.
#
# Expected: `--callbacks '[{"class_path": "Log"}]'` after a config replaces the config's list, so Log
#   has its default arguments; that is what a plain list of numbers does, and "callbacks+" is there
#   for those who want to add to a list.
# Seen: where the config has the same class at the same position, the arguments of the config stay
#   (every=50, tag=first), also those that a second config file does not name. At another position
#   the defaults hold, so what an item means depends on the order of the list before it.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'jsonargparse[signatures]==4.53.0' 'PyYAML==6.0.3'
cat >show.py <<'PYTHON'
import json
from pathlib import Path

from jsonargparse import ArgumentParser


class Callback:
    pass


class Log(Callback):
    def __init__(self, every: int = 1, tag: str = "default") -> None:
        pass


class Save(Callback):
    def __init__(self, every: int = 1) -> None:
        pass


parser = ArgumentParser()
parser.add_argument("--config", action="config")
parser.add_argument("--callbacks", type=list[Callback])
parser.add_argument("--milestones", type=list[int])
log, save = {"class_path": "__main__.Log"}, {"class_path": "__main__.Save"}
first = [{**log, "init_args": {"every": 50, "tag": "first"}}]
Path("first.json").write_text(json.dumps({"callbacks": first, "milestones": [30, 60]}))
Path("second.json").write_text(json.dumps({"callbacks": [log], "milestones": [10]}))


def parse(*words: str) -> list:
    given = parser.parse_args(["--config", "first.json", *words])
    print(*words, given.milestones, [vars(item.init_args) for item in given.callbacks])
    return [vars(item.init_args) for item in given.callbacks]


kept, default = {"every": 50, "tag": "first"}, {"every": 1, "tag": "default"}
assert parse("--callbacks", json.dumps([log])) == [kept]
assert parse("--config", "second.json") == [kept]
assert parse("--callbacks", json.dumps([save, log])) == [{"every": 1}, default]
some = [{**log, "init_args": {"tag": "second"}}]
assert parse("--callbacks", json.dumps(some)) == [{"every": 50, "tag": "second"}]
PYTHON
venv/bin/python show.py

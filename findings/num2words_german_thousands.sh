#!/usr/bin/env bash
# num2words 0.5.14: German thousands that end in one are spelled with an s: "einhunderteinstausend".
#
# Expected: 101,000 is "einhunderteintausend", as 1,000 is "eintausend" and 21,000
#   "einundzwanzigtausend": before "tausend" one is "ein".
# Seen: for all whole thousands n with n // 1000 of the form x01, the s stays: 9 of the 999 below a
#   million, with all that follows them, 9,000 numbers. 1,000 itself and 21,000 are right.
# Prints what was seen; exits with 1 if it is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet 'num2words==0.5.14'
cat >show.py <<'PYTHON'
from importlib.metadata import version

from num2words import num2words

print("num2words", version("num2words"))
for number in (1_000, 21_000, 101_000, 501_234):
    print(number, num2words(number, lang="de"))
wrong = [n for n in range(1_000, 1_000_000, 1_000) if "einstausend" in num2words(n, lang="de")]
print(len(wrong), "of 999:", *wrong)
assert wrong == [1_000 * (100 * hundred + 1) for hundred in range(1, 10)]
assert num2words(1_000, lang="de") == "eintausend"
PYTHON
venv/bin/python show.py

"""Writes the tables of a sweep over zoos into a page of the documentation."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

SHOWN = 3  # names of examples

HOOKS_HEAD = ("calls of step hooks in a step (stepped how)", "optimizers", "such as")

Row = Mapping[str, Any]
COLUMNS: Mapping[str, Callable[[Row], bool]] = {
    "tried": lambda row: True,
    "too large": lambda row: "too_large" in row,
    "too large: swapped and reverted on the meta device": lambda row: row.get("meta") == "done",
    "too large: refused": lambda row: "too_large" in row and "refused" in row,
    "not built": lambda row: "unbuilt" in row,
    "refused": lambda row: "refused" in row and "too_large" not in row,
    "swapped": lambda row: "swapped" in row and "too_large" not in row,
    "a finite step": lambda row: row.get("step") == "done",
    "reverted": lambda row: row.get("reverted") == "done",
    "exported": lambda row: row.get("export") == "done",
    "not exported, as without a swap": lambda row: row.get("export", "").startswith("as without"),
    "folded, of those with batch norms": lambda row: row.get("fold", "").startswith("done"),
}


def write_tables(page: Path, rows: Iterable[Row], totals: Mapping[str, int]) -> None:
    """Replace what is between the markers of `page`; the same rows give the same text."""
    rows = sorted(rows, key=lambda row: (row["zoo"], row["name"]))
    text = "\n\n".join((_counts(rows, totals), _norms(rows), _reasons(rows)))
    replace_between(page, "zoo", text)


def replace_between(page: Path, name: str, text: str) -> None:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def _table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    cells = [list(map(str, head)), *([str(x).replace("|", "\\|") for x in y] for y in lines)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _counts(rows: list[Row], totals: Mapping[str, int]) -> str:
    def line(zoo: str, total: int, chosen: list[Row]) -> list[object]:
        counts = [sum(map(has, chosen)) for has in COLUMNS.values()]
        batch = sum("fold" in row for row in chosen)
        return [zoo, total, *counts[:-1], f"{counts[-1]} of {batch}"]

    lines = [line(zoo, n, [row for row in rows if row["zoo"] == zoo]) for zoo, n in totals.items()]
    return _table(
        ("zoo", "architectures", *COLUMNS), [*lines, line("all", sum(totals.values()), rows)]
    )


def _norms(rows: list[Row]) -> str:
    """Count the layers of each class that were swapped or left, and in how many architectures."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        for key, count in row.get("swapped", {}).items():
            found[tuple(key.split(" → "))].append(count)
        for key, count in row.get("left", {}).items():
            before, _, reason = key.partition(": ")
            found[before, f"not swapped: {reason}"].append(count)
    lines = [(*key, sum(counts), len(counts)) for key, counts in found.items()]
    return _table(
        ("norm", "becomes", "layers", "architectures"), sorted(lines, key=lambda x: (-x[2], x))
    )


def _reasons(rows: list[Row]) -> str:
    """Group what was refused or did not work by its reason, with examples."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for stage in ("unbuilt", "refused", "failed", "meta", "step", "export", "fold", "reverted"):
            what = row.get(stage, "done")
            if not what.startswith("done"):
                found[stage, _without_names(what)].append(row["name"])
        if row.get("evaluates") is False:
            found["evaluates", "not to the same bits"].append(row["name"])
    lines = [(*key, len(names), _examples(names)) for key, names in found.items()]
    return _table(("stage", "reason", "architectures", "such as"), sorted(lines))


def _without_names(reason: str) -> str:
    """Return a reason without the names and numbers of one architecture, so that they group."""
    reason = re.sub(r"^InputError: ", "", reason)
    reason = re.sub(r"There is no (.*?) to swap in \w+\. Its norm layers are.*", r"no \1", reason)
    reason = re.sub(
        r"There is no (.*?) to swap in \w+\. It has no norm layers.*", "no norms", reason
    )
    return re.sub(r"\d+(\.\d+)*", "N", reason)


def _examples(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def write_optimizers(page: Path, rows: Iterable[Row], totals: Mapping[str, int]) -> None:
    """Replace the tables of the rules with optimizers."""
    rows = sorted(rows, key=lambda row: (row["zoo"], row["name"]))
    rules = list(next(iter(next(row["ways"] for row in rows if "ways" in row).values())))
    lines: list[list[object]] = []
    reasons: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for zoo, total in totals.items():
        chosen = [row for row in rows if row["zoo"] == zoo]
        ways = [way for row in chosen for way in row.get("ways", {}).values()]
        held = [f"{sum(way[rule] == 'held' for way in ways)} of {len(ways)}" for rule in rules]
        lines.append([zoo, total, len(chosen), sum("ways" not in row for row in chosen), *held])
    for row in rows:
        without = row.get("unbuilt") or row.get("failed") or "it took no step"
        if "ways" not in row:
            reasons[f"fails on its own: {_shorten(without)}"]["–"].add(row["name"])
        for way, outcomes in row.get("ways", {}).items():
            name = row["name"] if way == "plain" else f"{row['name']} ({way})"
            for rule, outcome in outcomes.items():
                if outcome != "held":
                    reasons[_shorten(outcome)][rule].add(name)
    calls: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for counts in row.get("hooks", ()):
            calls[counts].add(row["name"])
    hooks = [
        (counts, len(names), _examples(sorted(names)))
        for counts, names in sorted(calls.items(), key=lambda item: -len(item[1]))
    ]
    head = ("package", "optimizers", "tried", "fails on its own", *rules)
    grouped = [
        (
            reason,
            ", ".join(by_rule) if len(by_rule) < len(rules) else "all",
            len(names),
            _examples(sorted(names)),
        )
        for reason, by_rule in sorted(reasons.items())
        for names in [set().union(*by_rule.values())]
    ]
    reason_head = ("otherwise", "rules", "optimizers", "such as")
    tables = [_table(head, lines), _table(reason_head, grouped), _table(HOOKS_HEAD, hooks)]
    replace_between(page, "optimizers", "\n\n".join(tables))


def _shorten(reason: str) -> str:
    """Return a reason without the name of the optimizer and without numbers."""
    reason = re.sub(r"(got|the|which) [A-Z_]\w+( is|\.| in it)", r"\1 …\2", reason)
    return re.sub(r"^(refused: )[A-Z]\w+ (steps|has|works|is no)", r"\1… \2", reason)


def write_loops(page: Path, rows: Iterable[Row], totals: Mapping[str, int]) -> None:
    """Replace the tables of what a fit was tried with."""
    rows = sorted(rows, key=lambda row: (row["zoo"], row["name"]))
    same: dict[str, list[str]] = defaultdict(list)
    others: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        outcomes = row.get("outcomes") or {"any": [f"wrong: {row.get('failed')}"]}
        if all(found == ["same bits"] for found in outcomes.values()):
            same[row["zoo"]].append(f"`{row['name']}`")
        for part, found in outcomes.items():
            for outcome in found:
                if outcome != "same bits":
                    others[row["zoo"], outcome, row["name"]].append(part)
    lines = [
        (zoo, total, sum(row["zoo"] == zoo for row in rows), len(same[zoo]), ", ".join(same[zoo]))
        for zoo, total in totals.items()
    ]
    head = ("group", "cases", "tried", "same bits", "which")
    rest = [(zoo, name, "; ".join(p), why) for (zoo, why, name), p in sorted(others.items())]
    other_head = ("group", "case", "with", "otherwise")
    replace_between(page, "loops", f"{_table(head, lines)}\n\n{_table(other_head, rest)}")

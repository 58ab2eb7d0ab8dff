"""What a swap did to the norms of a model, to be printed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_FUSED_WORDS = {
    "relu": "with the ReLU after them",
    "add_relu": "with the addition and the ReLU after them",
    "": "with nothing any more",
}


@dataclass(frozen=True)
class Swap:
    """One line of a report: the module's name, what it was, what it is, and why if it was left."""

    name: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What `swap_norms` did, or would do: the swapped modules, and the norms it left alone.

    Likewise the norms that it fused with what follows them, or no longer, and those that it could
    not fuse. It prints as a table under rich, and as one line otherwise.
    """

    swapped: tuple[Swap, ...]
    left: tuple[Swap, ...]
    dry_run: bool = False
    fused: tuple[Swap, ...] = ()
    not_fused: tuple[Swap, ...] = ()

    def __len__(self) -> int:
        return len(self.swapped)

    def __str__(self) -> str:
        kinds: dict[tuple[str, str], int] = {}
        for swap in self.swapped:
            kinds[swap.before, swap.after] = kinds.get((swap.before, swap.after), 0) + 1
        counts = [f"{count} {before} → {after}" for (before, after), count in kinds.items()]
        left = f"; {len(self.left)} left as they are" if self.left else ""
        swapped = ("would swap " if self.dry_run else "swapped ") + (", ".join(counts) or "0")
        return swapped + left + self._fused()

    def _fused(self) -> str:
        kinds = Counter(swap.after for swap in self.fused)
        counts = [f"{count} {_FUSED_WORDS[after]}" for after, count in kinds.items()]
        if counts:
            counts[0] = ("would fuse " if self.dry_run else "fused ") + counts[0]
        if self.not_fused:
            counts.append(f"{len(self.not_fused)} not fused")
        return f"; {', '.join(counts)}" if counts else ""

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table("module", "from", "to", title=escape(str(self)))
        for swap in (*self.swapped, *self.left):
            fate = escape(swap.after) or f"[dim]left: {escape(swap.reason)}[/dim]"
            table.add_row(escape(swap.name), escape(swap.before), fate)
        for swap in (*self.fused, *self.not_fused):
            does = f"fused {_FUSED_WORDS[swap.after]}" if swap.after else "not fused"
            reason = f"[dim]not fused: {escape(swap.reason)}[/dim]"
            table.add_row(escape(swap.name), escape(swap.before), reason if swap.reason else does)
        return table

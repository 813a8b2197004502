"""Lines of text for a terminal: wrapped, indented, in columns, as a histogram. Left out: colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_BARS, _LONGEST_BAR = (10, 60)  # of a histogram: how many, and sometimes one more; characters


def visible(text: str) -> str:
    """Line breaks and other control characters, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, max(width, len(rest) + 20), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def indented(spaces: int, lines: Iterable[str]) -> Iterator[str]:
    return (" " * spaces + line for line in lines)


def aligned(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Rows of cells as lines of columns, those in `right` flush right; empty columns are left out."""
    columns = [column for column in range(len(rows[0])) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in rows) for column in columns}
    return [
        "  ".join(
            row[c].rjust(widths[c]) if c in right else row[c].ljust(widths[c]) for c in columns
        ).rstrip()
        for row in rows
    ]


def histogram(values: np.ndarray, width: int) -> list[str]:
    """Lines `20-29  4  ########`: about ten intervals between round numbers.

    Args:
        values: [n], whole numbers, n ≥ 1.
        width: characters of the line with the longest bar.
    """
    spread = int(values.max() - values.min()) + 1
    step = 1
    while step * _BARS < spread:  # 1, 2, 5, 10, 20, 50, …
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    first = int(values.min()) // step * step
    counts = np.bincount((values - first) // step)
    bounds = [(first + position * step, first + (position + 1) * step - 1) for position in range(len(counts))]
    rows = [
        [f"{low:,}" if low == high else f"{low:,}-{high:,}", f"{count:,}"]
        for (low, high), count in zip(bounds, counts, strict=True)
    ]
    heads = aligned(rows, right={0, 1})
    room = min(max(width - len(heads[0]) - 2, 1), _LONGEST_BAR)
    bars = ["#" * max(round(room * int(count) / int(counts.max())), int(count > 0)) for count in counts]
    return [f"{head}  {bar}".rstrip() for head, bar in zip(heads, bars, strict=True)]


def in_bytes(number: float) -> str:
    """`1.2 GB`."""
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if number >= unit), (1e3, "kB")
    )
    return f"{number / unit:,.1f} {name}"

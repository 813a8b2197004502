"""Rows that cannot be used: what is said about one, and where it goes. No row is dropped in silence.

Each reader of `datasets/` has an argument `rejects`. With `None` the first bad row raises `DataError`; with
anything that has an `append`, a list or a `RejectLog`, the row is appended as a `Reject` and reading
continues. Faults of a file (missing, not UTF-8, broken JSON) raise in either case: they are no row's.

How many rejected rows a run puts up with is the caller's decision.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, TextIO

from ..errors import DataError
from ..storage.whole import write_file

# The phrases by which the readers' rejects are counted; they stay as they are, since they end up in
# `stage.json`.
Reason = Literal[
    "line is not JSON",
    "malformed row",
    "unknown speaker",
    "turns do not alternate",
    "last turn is a question",
    "empty question",
    "empty answer",
    "unknown answer type",
    "marker in an answer",
    "marker in a question",
    "image count differs from marker count",
    "video or audio",
    "malformed image path",
    "absolute image path",
    "image outside image folder",
    "missing image",
]


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that is not used, and why.

    Args:
        file: the data file, as the reader was given it.
        row: the row's number in it, counted from 1; in JSON lines the line's number.
        id: the row's own id, or `"row 17"` where it has none.
        reason: a short phrase that stays the same, for counting (`Reason` lists the readers').
        detail: the sentence for a person: what came, what was wanted.
    """

    file: str
    row: int
    id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row} (id {self.id!r}): {self.detail}"

    def to_dict(self) -> dict[str, str | int]:
        """The fields by name, as a line of `rejected.jsonl` holds them."""
        return asdict(self)


class Rejects(Protocol):
    """Whatever takes rejects: a list, a `RejectLog`."""

    def append(self, reject: Reject, /) -> object:
        """Take one reject."""


class BadRow(DataError):
    """Raised inside a reader: the row at hand cannot be used. The reader makes a `Reject` of it with
    `refuse`.

    Args:
        reason: the phrase it is counted under.
        detail: the sentence for a person.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


def refuse(rejects: Rejects | None, file: str | os.PathLike[str], row: int, id: str, fault: BadRow) -> None:
    """Append the row to `rejects`; without any, raise.

    Raises:
        DataError: `rejects` is `None`; the message is `file:row (id …): detail`.
    """
    reject = Reject(os.fspath(file), row, id, fault.reason, fault.detail)
    if rejects is None:
        raise DataError(str(reject)) from fault
    rejects.append(reject)


class RejectLog:
    """A JSON-lines file of rejects (`rejected.jsonl`) that counts them by reason; a context manager.

    The file comes into being with the first reject; one left there by an earlier run is removed at the start,
    so a file at `path` always speaks of this run. A row that comes again for the same reason (of a file that
    two stages read, of an index that is used again) is counted and not written: each is there once.

    >>> with RejectLog(folder / "rejected.jsonl") as log:
    ...     conversations = list(llava_json.read(path, rejects=log))
    >>> log.total, log.commonest(1)
    (3, [('missing image', 2)])

    Args:
        path: where to write.
        keep: continue the file that is there, of a run that was interrupted, instead of removing it.
    """

    def __init__(self, path: str | os.PathLike[str], keep: bool = False) -> None:
        self.path = Path(path)
        self.counts: Counter[str] = Counter()
        self._file: TextIO | None = None
        self._written: set[int] = set()  # hashes of the lines
        if not keep:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]  # a full disk cuts the last line short
            self._written.update(map(hash, complete.splitlines(keepends=True)))
            if complete != text:
                self._replace(complete.splitlines(keepends=True))

    def forget(self, reasons: Iterable[str]) -> None:
        """Drop the lines of an earlier call that give one of these reasons; rows to which it still applies
        come again."""
        if not self._written:
            return
        old, lines = (set(reasons), self.path.read_text(encoding="utf-8").splitlines(keepends=True))
        kept = [line for line in lines if json.loads(line)["reason"] not in old]
        if len(kept) < len(lines):
            self._replace(kept)

    def _replace(self, lines: list[str]) -> None:
        """Make these the file's lines; whoever is killed meanwhile has kept the old ones."""
        self._written = set(map(hash, lines))
        if not lines:
            self.path.unlink()
            return
        write_file(self.path, "".join(lines))

    def append(self, reject: Reject, /) -> None:
        """Write one reject as a line, at once, unless it is there; and count it."""
        self.counts[reject.reason] += 1
        line = json.dumps(reject.to_dict()) + "\n"
        if hash(line) in self._written:
            return
        self._written.add(hash(line))
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered: the log of a run that was killed is complete. Appending: one that was closed goes
            # on.
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write(line)

    @property
    def total(self) -> int:
        """How many rows were rejected."""
        return self.counts.total()

    def commonest(self, count: int = 3) -> list[tuple[str, int]]:
        """The most frequent reasons with their numbers, most frequent first."""
        return self.counts.most_common(count)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RejectLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

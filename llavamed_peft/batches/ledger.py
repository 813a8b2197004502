"""The ledger of a data set: every row ends as used, as rejected (with a reason) or as failed (with an error).

Rows are rejected while they are checked, before training. Rows fail later: an image whose header is fine and
whose pixels are not is found when it is decoded. Its conversations leave their step, which gets smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..datasets.rejects import Reject, RejectLog
from .decoding import DeviceInputs
from .index import FileCount, Index, row_number


@dataclass(slots=True)
class Ledger:
    """What became of the rows that a stage trains on, or measures its held-out loss on.

    Args:
        index: the rows that passed the checks, with the counts of those that did not.
        kind: how an error names the data: `"training"` or `"held-out"`.
        max_rejected: share of the rows above which the data are refused, rejected and failed ones together.
        failed: row of the index → reason; the same on all processes.
    """

    index: Index
    kind: str
    max_rejected: float
    failed: dict[int, str] = field(default_factory=dict)

    def newly_failed(self, step: Iterable[DeviceInputs]) -> dict[int, str]:
        """The rows of this process's share of a step that could not be decoded and were not known to fail."""
        return {row: why for batch in step for row, why in batch.failed if row not in self.failed}

    def fault(self) -> str | None:
        """Why the data cannot be used any longer, in a sentence; `None` while they can."""
        return fault(self.index.files, len(self.failed), self.max_rejected)

    def list_failed(self, rejects: RejectLog, stage: str) -> None:
        """Name each failed row in the log of rejected rows."""
        file_of_row = self.index.column("file")
        for row, reason in sorted(self.failed.items()):
            source, id = self.index.source_and_id(row)
            file = self.index.files[file_of_row[row]].path
            rejects.append(Reject(file, row_number(source), id, failed_in(stage), reason))

    def account(self) -> list[dict[str, object]]:
        """For `stage.json`: each file with its hash and its rows = used + rejected + failed."""
        file_of_row = self.index.column("file")
        failed = Counter(int(file_of_row[row]) for row in self.failed)
        return [
            {
                "file": count.name,
                "sha256": count.sha256,
                "rows": count.rows,
                "used": count.used - failed[file],
                "rejected": count.rejected,
                "failed": failed[file],
            }
            for file, count in enumerate(self.index.files)
        ]


def fault(files: Iterable[FileCount], failed: int, max_rejected: float) -> str | None:
    """Why data are refused, in a sentence that names the most common reasons; `None` where they are not.

    Args:
        files: what became of each file's rows when they were checked.
        failed: rows that failed since.
        max_rejected: share of the rows above which the data are refused.
    """
    files = list(files)
    rows = sum(count.rows for count in files)
    used = sum(count.used for count in files) - failed
    names = ", ".join(count.name for count in files)
    if rows == 0:
        return f"{names}: no rows; wanted at least one conversation."
    if (rows - used) / rows <= max_rejected and used > 0:
        return None
    reasons = Counter({"an image cannot be decoded": failed} if failed else {})
    for count in files:
        reasons.update(count.rejected)
    commonest = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
    return (
        f"{names}: {rows - used} of {rows} rows cannot be used ({(rows - used) / rows:.1%}; max_rejected is "
        f"{max_rejected:.1%}). Commonest: {commonest}."
    )


def failed_in(stage: str) -> str:
    """The reason under which rows are listed that failed while a stage trained."""
    return f"failed while training {stage}"

"""A data set with everything checked but the pixels: one Arrow file beside the run, read lazily.

Each conversation is encoded once, with its images' sizes read from their headers, so that what cannot be used is known before
training begins and is counted. An image whose header is fine and whose pixels are not is found when it is decoded, while
training: its conversations leave their step, which gets smaller, and are counted as failed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..conversations import Conversation, Turn
from ..datasets.rejects import Reject, RejectLog
from ..datasets.sources import Source
from ..errors import DataError
from ..images import MAX_PIXELS, image_size
from .collator import Batch, PackedCollator, check_length, token_sequence
from .encoding import IGNORED
from .steps import Prefixes

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("file", pa.int32()),
        ("images", pa.list_(pa.string())),
        ("turns", pa.string()),
        ("group", pa.int64()),
        ("length", pa.int32()),
        ("image_tokens", pa.int32()),
        ("supervised_tokens", pa.int32()),
        ("prefix", pa.int64()),
        ("prefix_tokens", pa.int32()),
    ]
)
_ROWS_PER_BATCH = 1000
LONGEST_STRIP = 100  # times its width, of an image that is still shown


@dataclass(frozen=True, slots=True)
class FileCount:
    """What became of one file's rows: `rows` = `used` + all of `rejected`."""

    name: str
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]


@dataclass(slots=True)
class Index:
    """The usable conversations of some data.

    Args:
        rows: one per conversation, columns as `SCHEMA`; memory-mapped.
        files: what became of the rows of each file.
        failed: row → reason, of conversations whose images could not be decoded while training.
    """

    rows: Dataset
    files: list[FileCount]
    failed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Index:
        """The conversations of an index that another process built; the counts of its files are that process's."""
        return cls(Dataset.from_file(str(path)), [])

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [conversations]."""
        return np.asarray(self.rows.data.column(name))

    def prefixes(self) -> Prefixes:
        """What the conversations begin with, by which packed steps are planned."""
        return Prefixes(self.column("prefix"), self.column("prefix_tokens"))

    def conversation(self, row: int) -> Conversation:
        """One conversation, as it was read."""
        values = self.rows[int(row)]
        turns = tuple(Turn(role, text) for role, text in json.loads(values["turns"]))
        return Conversation(values["id"], turns, tuple(values["images"]), values["source"])

    def report_failures(self, rejects: RejectLog) -> None:
        """Name each failed row in the log of rejected ones."""
        for row, reason in sorted(self.failed.items()):
            conversation = self.conversation(row)
            name = conversation.source.rpartition(":")[0]
            rejects.append(Reject(name, row_number(conversation.source), conversation.id, "failed while training", reason))

    def account(self) -> list[dict[str, object]]:
        """For `stage.json`: each file with its hash and rows = used + rejected + failed."""
        file_of_row = self.column("file")
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
            for file, count in enumerate(self.files)
        ]


def build_index(
    sources: Sequence[Source], collator: PackedCollator, path: Path, rejects: RejectLog, max_rejected: float | None
) -> Index:
    """Check every row of the sources and write the usable ones to `path`.

    Args:
        collator: its encoder and `max_length` decide what fits.
        rejects: where unusable rows go, each with file, row, id and reason.
        max_rejected: share of the rows above which the data are refused as a whole; `None`: whatever there is, none included.

    Raises:
        DataError: a file that cannot be read, too many rejected rows (the commonest reasons are named), or none left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    groups: dict[tuple[str, ...], int] = {}
    files: list[FileCount] = []
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for file, source in enumerate(sources):
            before = Counter(rejects.counts)
            used = 0
            pending: list[dict[str, object]] = []
            for conversation in source.read(rejects):
                row = _check(conversation, source, collator, rejects)
                if row is not None:
                    used += 1
                    key = tuple(os.path.realpath(image) for image in conversation.images) or ("", str(len(groups)))
                    pending.append({**row, "file": file, "group": groups.setdefault(key, len(groups))})
                if len(pending) == _ROWS_PER_BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(pending, SCHEMA))
                    pending = []
            if pending:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, SCHEMA))
            rejected = dict(Counter(rejects.counts) - before)
            files.append(FileCount(source.name, source.sha256, used + sum(rejected.values()), used, rejected))
    if max_rejected is not None and (fault := fault_of_share(files, max_rejected)):
        if any(count.rejected for count in files):
            fault += f" Each row is listed in {rejects.path.name}. Mend the data, or raise max_rejected."
        raise DataError(fault)
    os.replace(partial, path)
    return Index(Dataset.from_file(str(path)), files)


def _check(conversation: Conversation, source: Source, collator: PackedCollator, rejects: RejectLog) -> dict[str, object] | None:
    reason = "unreadable image"
    try:
        sizes = [_bounded(image, image_size(image)) for image in conversation.images]
        reason = "cannot be encoded"
        counts = collator.encoder.count_image_tokens(sizes)
        encoded = collator.encoder.encode(conversation, counts)
        reason = "longer than max_length" if len(encoded.input_ids) > collator.max_length else "no supervised token"
        check_length(conversation, encoded, collator.max_length)
    except DataError as error:
        rejects.append(Reject(source.path, row_number(conversation.source), conversation.id, reason, str(error)))
        return None
    paths = [os.path.realpath(image) for image in conversation.images]
    sequence = token_sequence(encoded, paths, counts, collator.encoder)
    return {
        "id": conversation.id,
        "source": conversation.source,
        "images": list(conversation.images),
        "turns": json.dumps([[turn.role, turn.text] for turn in conversation.turns]),
        "length": len(encoded.input_ids),
        "image_tokens": encoded.image_tokens,
        "supervised_tokens": encoded.supervised_tokens,
        "prefix": sequence.prefix_key(),
        "prefix_tokens": sequence.image_prefix,
    }


def _bounded(image: str, size: tuple[int, int]) -> tuple[int, int]:
    """Refuse a strip: padded to a square, or with its short side made as long as a tile's, it would fill the memory."""
    long, short = max(size), min(size)
    if long**2 > MAX_PIXELS or long > LONGEST_STRIP * short:
        raise DataError(
            f"{image} is {size[1]} × {size[0]} pixels; wanted a longer side of at most {int(MAX_PIXELS**0.5):,} and "
            f"{LONGEST_STRIP} times the shorter one, since it is padded to a square."
        )
    return size


def fault_of_share(files: Sequence[FileCount], max_rejected: float) -> str | None:
    """Why the data are refused as a whole, in a sentence that names the commonest reasons; `None` where they are not."""
    rows, used = sum(count.rows for count in files), sum(count.used for count in files)
    names = ", ".join(count.name for count in files)
    if rows == 0:
        return f"{names}: no rows; wanted at least one conversation."
    if (rows - used) / rows > max_rejected or used == 0:
        reasons: Counter[str] = sum((Counter(count.rejected) for count in files), Counter())
        commonest = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
        return (
            f"{names}: {rows - used} of {rows} rows cannot be used ({(rows - used) / rows:.1%}; max_rejected is "
            f"{max_rejected:.1%}). Commonest: {commonest}."
        )
    return None


def row_number(source: str) -> int:
    """The row of a conversation's `source`, such as 17 of `"file.json:17"`."""
    return int(source.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """One device batch as a worker hands it over.

    Args:
        inputs: of the model, `labels` included, packed ones with `ends` in the mask's place.
        conversations: how many it holds; 0 for a batch that only keeps step with other processes.
        supervised_tokens: how many of its tokens count in the loss.
        failed: (row of the index, reason) of conversations left out because an image could not be decoded.
    """

    inputs: Batch
    conversations: int
    supervised_tokens: int
    failed: tuple[tuple[int, str], ...] = ()


class DeviceBatches:
    """The index as a torch data set: rows of one device batch → `DeviceInputs`, decoding in whatever worker asks."""

    def __init__(self, index: Index, collator: PackedCollator):
        self.index = index
        self.collator = collator

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Sequence[int]) -> DeviceInputs:
        conversations = [self.index.conversation(row) for row in rows]
        failed: list[tuple[int, str]] = []
        try:
            inputs = self.collator.inputs(conversations)
        except DataError:
            failed = [(row, why) for row, one in zip(rows, conversations, strict=True) if (why := self._fault(one))]
            lost = {row for row, _ in failed}
            conversations = [one for row, one in zip(rows, conversations, strict=True) if row not in lost]
            inputs = self.collator.inputs(conversations)
        supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
        return DeviceInputs(inputs, len(conversations), supervised, tuple(failed))

    def _fault(self, conversation: Conversation) -> str | None:
        try:
            self.collator.inputs([conversation])
        except DataError as error:
            return str(error)
        return None

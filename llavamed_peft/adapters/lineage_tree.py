"""Where a finished stage comes from, as a tree: `show`.

Read from the records (`stage.json`) of the stage and of those in the same folder; no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..reporting.text import visible, wrapped
from .record import RECORD, DataFile, StageRecord
from .stage_adapter import local_folder

_SHORT = 12  # digits of a hash


@dataclass(frozen=True, slots=True)
class _Node:
    text: str
    children: tuple[_Node, ...] = ()


def show(adapter: str | Path, width: int = 100) -> list[str]:
    """A finished stage as a tree of lines: base, earlier stages, and the schedule, data and metrics of each.

    A stage before it is described if its folder is next to that of its child, found by the content hash.

    Args:
        adapter: a stage's folder, or a Hub repository of one; weights are not read and need not be there.
        width: characters of a line.

    Raises:
        AdapterError: there is no stage's record, or it is damaged.
    """
    folder = local_folder(adapter, only=RECORD)
    record = StageRecord.read(folder)
    neighbours = {other.sha256: (path, other) for path, other in _records_neighbours(folder)}
    node = _stage_node(folder, record)
    seen = {record.sha256}
    while (parent := record.parent) is not None:
        if parent.sha256 not in neighbours or parent.sha256 in seen:
            node = _Node(
                f"{parent.stage}, sha256 {parent.sha256[:_SHORT]}: is not in the same folder", (node,)
            )
            break
        seen.add(parent.sha256)
        folder, record = neighbours[parent.sha256]
        node = _stage_node(folder, record, (node,))
    base = record.base
    identity = f"revision {base.revision}" if base.id else f"sha256 {str(base.sha256)[:_SHORT]}"
    kind = f"{base.model_type} over {base.language_model} and {base.vision_tower}"
    return list(_branches(_Node(f"{base.public_name}: {kind}, {identity}", (node,)), width))


def _records_neighbours(folder: Path) -> Iterator[tuple[Path, StageRecord]]:
    for path in sorted(folder.resolve().parent.iterdir()):
        if (path / RECORD).is_file():
            try:
                yield path, StageRecord.read(path)
            except AdapterError:  # another folder's damage is not what was asked about
                continue


def _stage_node(folder: Path, record: StageRecord, next_stages: tuple[_Node, ...] = ()) -> _Node:
    stage, metrics = record.stage.to_dict(), record.metrics
    details = [_Node(f"schedule: {_pairs(stage['schedule'])}")]
    if stage.get("lora"):
        details.append(_Node(f"lora: {_pairs(stage['lora'])}"))
    for title, files in (("data", record.data), ("held out", record.eval_data)):
        if files:
            details.append(_Node(title, tuple(_Node(_account(entry)) for entry in files)))
    details.append(
        _Node("metrics", tuple(_Node(f"{name}: {_plain(value)}") for name, value in metrics.items()))
    )
    details.append(_Node(f"made on {record.device} with {_pairs(record.versions)}"))
    sha256, name = record.sha256[:_SHORT], folder.resolve().name
    title = f"{stage['name']}: {stage['trains']} ({record.kind}), sha256 {sha256}, in {name}"
    return _Node(title, (*details, *next_stages))


def _account(entry: DataFile) -> str:
    """`a.json, sha256 0123…: 12 rows = 9 used + 2 missing image + 1 failed`."""
    parts = {"used": entry.used, **entry.rejected, "failed": entry.failed}
    rows = " + ".join(f"{number:,} {what}" for what, number in parts.items() if number or what == "used")
    return f"{entry.file}, sha256 {entry.sha256[:_SHORT]}: {entry.rows:,} rows = {rows}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else "–"
        if value is None
        else str(value)
    )


def _branches(node: _Node, width: int, first: str = "", rest: str = "") -> Iterator[str]:
    """The tree's lines. `first` comes before the node's own first line, `rest` before all lines below it."""
    yield from wrapped(visible(node.text), width, first, rest + ("│  " if node.children else "   "))
    for position, child in enumerate(node.children, start=1):
        last = position == len(node.children)
        yield from _branches(
            child, width, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  ")
        )

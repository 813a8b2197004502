"""The catalogue of published adapters: one folder `<base>--<stage>/` each, and an index table made from their
`stage.json`.

A complete entry is a stage's folder as training left it and loads at once. Of an adapter whose
weights are on the Hub the entry has the small files only (`adapter_config.json`, `stage.json`, `README.md`);
the hash in its `stage.json` pins the weights. Either way the folder's name and the table follow from
`stage.json`, so nothing in the table is written by hand.
Publishing to the Hub and downloading from it are left out, and so are full stages: their checkpoints are
models of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError
from ..storage.whole import write_file
from .record import CARD, CONFIG, RECORD, WEIGHTS, StageRecord
from .stage_adapter import StageAdapter

INDEX = "README.md"

BEGIN, END = (
    "<!-- index: made from the stage.json files by `llavamed-peft catalogue` -->",
    "<!-- end of the index -->",
)

_SHORT = 12  # digits of a hash in the table

_NEW_INDEX = f"""\
# Adapters

One folder per published adapter, named `<base>--<stage>`. The table is made from their `stage.json` files:
`llavamed-peft catalogue FOLDER` renews it.

{BEGIN}
{END}
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of the catalogue.

    Args:
        folder: of the entry.
        record: what its `stage.json` says.
        size: bytes of its weights, or `None` where they are on the Hub.
    """

    folder: Path
    record: StageRecord
    size: int | None

    @classmethod
    def read(cls, folder: Path) -> Entry:
        """Read one folder of the catalogue and check that it is what its name says.

        Raises:
            AdapterError: a file is missing or damaged, or the name is not `<base>--<stage>`.
        """
        missing = [name for name in (RECORD, CONFIG, CARD) if not (folder / name).is_file()]
        if missing:
            raise AdapterError(
                f"{folder}: has no {', '.join(missing)}; wanted each of {RECORD}, {CONFIG} and {CARD} in a "
                "folder of the catalogue."
            )
        record = StageRecord.read(folder)
        if record.kind != "adapter":
            raise AdapterError(
                f"{folder}: is a full stage's {record.kind}; the catalogue holds adapters only. Publish it "
                "as a model."
            )
        base, stage = record.base.name, record.stage.name
        if folder.name != f"{base}--{stage}":
            raise AdapterError(
                f"{folder}: {RECORD} says base {base!r} and stage {stage!r}; wanted the folder's name to be "
                f"'{base}--{stage}'. Rename it."
            )
        weights = folder / WEIGHTS
        if not weights.is_file():
            return cls(folder, record, None)
        StageAdapter.load(folder)
        return cls(folder, record, weights.stat().st_size)

    def row(self, folder_of: Mapping[str, str]) -> list[str]:
        """The entry's cells in the table.

        Args:
            folder_of: content hash → folder, of every adapter in the catalogue, to which a parent is linked.
        """
        record = self.record
        parent, base, stage, metrics = record.parent, record.base, record.stage, record.metrics
        origin = "–"
        if parent is not None:
            there = folder_of.get(parent.sha256)
            origin = f"[{parent.stage}]({there})" if there else f"{parent.stage} `{parent.sha256[:_SHORT]}`"
        return [
            f"[{stage.name}]({self.folder.name})",
            base.public_name,
            stage.trains,
            origin,
            ", ".join(f"{entry.file} ({entry.used:,})" for entry in record.data),
            f"{_loss(metrics['eval_loss_before'])} → {_loss(metrics['eval_loss_after'])}",
            "on the Hub" if self.size is None else f"{self.size / 1e6:.2f}",
            f"`{record.sha256[:_SHORT]}`",
        ]


_COLUMNS = ("stage", "base", "trains", "parent", "data (rows used)", "held-out loss", "MB", "sha256")


def table(folder: str | Path) -> str:
    """The index of a catalogue, as a Markdown table; an adapter comes after the one it continues.

    Args:
        folder: of the catalogue; hidden folders and plain files in it are left alone.

    Raises:
        AdapterError: there is no such folder, or one in it is not named as its `stage.json` says, or is
            damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; wanted the catalogue's.")
    entries = [
        Entry.read(path)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    ]
    folder_of = {entry.record.sha256: entry.folder.name for entry in entries}
    rows = [_COLUMNS, ["---"] * len(_COLUMNS)]
    rows += [[cell.replace("|", "\\|") for cell in entry.row(folder_of)] for entry in _in_lineage(entries)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def update(folder: str | Path) -> Path:
    """Write the table into the catalogue's `README.md`, between its two marker lines; the rest of the file
    stays.

    Returns:
        The file. If there was none, it is made.

    Raises:
        AdapterError: as `table`; or the file has not both markers, in order, or cannot be written.
    """
    rows, path = table(folder), Path(folder) / INDEX
    text = path.read_text(encoding="utf-8") if path.is_file() else _NEW_INDEX
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise AdapterError(
            f"{path}: wanted a line {BEGIN} and below it a line {END}, for the table between them."
        )
    try:
        write_file(path, f"{before}{BEGIN}\n\n{rows}\n{END}{after}")
    except OSError as error:
        raise AdapterError(f"{path}: cannot be written ({error}).") from error
    return path


def _in_lineage(entries: Sequence[Entry]) -> list[Entry]:
    """By base, then by how many ancestors are in the catalogue, then by name."""
    parents = {entry.record.sha256: entry.record.parent and entry.record.parent.sha256 for entry in entries}

    def generation(entry: Entry) -> int:
        seen, above = set(), parents[entry.record.sha256]
        while above in parents and above not in seen:
            seen.add(above)
            above = parents[above]
        return len(seen)

    return sorted(entries, key=lambda entry: (entry.record.base.name, generation(entry), entry.folder.name))


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

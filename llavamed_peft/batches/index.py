"""A data set with everything checked but the pixels: one Arrow file in the run's folder, read lazily.

`checking.py` writes it. Apart from the rows, the file holds what it was made from, which rows were rejected,
and the counts of each data file. Rows whose pixels turn out to be damaged are in the `Ledger`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..conversations import Conversation, Turn
from ..errors import DataError
from ..packing.collator import PackedCollator
from ..packing.encoding import Encoder, Tokenized, Tokens
from ..stages import Schedule
from ..storage.images import image_size
from .shares import Prefixes
from .steps import StepSampler

SCHEMA = pa.schema(
    [
        # As it was read.
        ("id", pa.string()),
        ("source", pa.string()),  # "file.json:17"
        ("images", pa.list_(pa.string())),  # paths
        ("turns", pa.string()),  # JSON: [[role, text, supervised], …]
        ("system", pa.string()),
        # As it is encoded, each image one placeholder.
        ("token_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        # What steps are planned from, each image all its tokens.
        ("length", pa.int32()),
        ("image_tokens", pa.int32()),
        ("supervised_tokens", pa.int32()),
        # equal where conversations begin alike, up to the last image before an answer
        ("prefix", pa.int64()),
        ("prefix_tokens", pa.int32()),
        ("file", pa.int32()),  # which of `files`
        ("group", pa.int64()),  # equal where the image files are the same
    ]
)

# Keys of what the file holds apart from the rows.
FINGERPRINT, REJECTED, FILES = b"fingerprint", b"rejected", b"files"
_ROWS_LOOKED_AT = 200  # to estimate how many tiles conversations have


@dataclass(frozen=True, slots=True)
class FileCount:
    """What became of one file's rows: `rows` = `used` + all of `rejected`."""

    name: str
    path: str
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]


@dataclass(frozen=True, slots=True)
class Index:
    """The usable conversations of some data.

    Args:
        rows: one per conversation, columns as `SCHEMA`; memory-mapped.
        files: what became of the rows of each file.
    """

    rows: Dataset
    files: list[FileCount]

    @classmethod
    def open(cls, path: Path) -> Index:
        """An index that this or another process built."""
        files = [FileCount(**count) for found in notes(path) for count in found.get(FILES, [])]
        return cls(Dataset.from_file(str(path)), files)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [conversations]."""
        return np.asarray(self.rows.data.column(name))

    def prefixes(self) -> Prefixes:
        """What the conversations begin with, by which packed steps are planned."""
        return Prefixes(self.column("prefix"), self.column("prefix_tokens"))

    def sampler(
        self, collator: PackedCollator, schedule: Schedule, seed: int, rank: int = 0, world_size: int = 1
    ) -> StepSampler:
        """Deals these rows out in optimizer steps, in device batches such as the collator lays out; see
        `StepSampler`.

        Args:
            collator: with a bound on a device batch's tokens.
        """
        assert collator.max_row_tokens is not None
        return StepSampler(
            self.column("length"),
            self.column("group"),
            schedule,
            collator.max_row_tokens,
            seed,
            rank,
            world_size,
            prefixes=self.prefixes() if collator.layout == "packed" else None,
            fill_tokens=collator.fill_tokens,
        )

    def image_counts(self) -> np.ndarray:
        """[conversations], how many images each shows."""
        return np.asarray(pc.list_value_length(self.rows.data.column("images")))

    def mean_tiles(self, encoder: Encoder) -> float:
        """What the vision tower sees of a conversation's images; where they have several tiles, from the
        headers of some."""
        if not encoder.sends_image_sizes:
            return float(self.image_counts().mean())
        looked_at = range(0, len(self), max(1, len(self) // _ROWS_LOOKED_AT))
        tiles = 0
        for images in (self.tokenized(row).images for row in looked_at):
            for image in images:
                with contextlib.suppress(DataError):  # will be left out
                    tiles += encoder.tiles(
                        image_size(image), len(images) == 1 or not encoder.tiles_lone_images_only
                    )
        return tiles / len(looked_at)

    def shown_images(self) -> Iterator[tuple[str, list[str]]]:
        """Of each conversation how an error names it, and the paths of its images."""
        columns = [self.rows.data.column(name) for name in ("source", "id", "images")]
        for source, id, images in zip(*columns, strict=True):
            yield f"{source} (id {id})", images.as_py()

    def conversation(self, row: int) -> Conversation:
        """One conversation, as it was read."""
        values = self.rows[int(row)]
        turns = tuple(Turn(*turn) for turn in json.loads(values["turns"]))
        return Conversation(values["id"], turns, tuple(values["images"]), values["source"], values["system"])

    def tokenized(self, row: int) -> Tokenized:
        """One conversation, its words as tokens."""
        cells = {
            name: self.rows.data.column(name)[int(row)]
            for name in ("id", "images", "source", "token_ids", "supervised")
        }
        ids, supervised = (
            cells[name].values.to_numpy(zero_copy_only=False) for name in ("token_ids", "supervised")
        )
        images = tuple(cells["images"].as_py())
        return Tokenized(cells["id"].as_py(), images, cells["source"].as_py(), Tokens(ids, supervised))

    def source_and_id(self, row: int) -> tuple[str, str]:
        """Where a conversation comes from, such as `"file.json:17"`, and its id."""
        source, id = (self.rows.data.column(name)[int(row)].as_py() for name in ("source", "id"))
        return source, id


def notes(path: Path) -> Iterator[dict[bytes, list[dict[str, object]]]]:
    """What each of the file's batches holds apart from rows: rejected rows, and with the last the counts
    of the files."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        while True:
            try:
                found = reader.read_next_batch_with_custom_metadata().custom_metadata
            except StopIteration:
                return
            yield {key: json.loads(value) for key, value in (found or {}).items()}


def row_number(source: str) -> int:
    """The row of a conversation's `source`, such as 17 of `"file.json:17"`."""
    return int(source.rpartition(":")[2])

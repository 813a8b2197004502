"""Rows of the index → one device batch, decoding in whatever worker asks: what the data loader loads.

An image whose header was fine and whose pixels are not is found here: its conversations leave their step,
which gets smaller, and count as failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..packing.collator import Batch, PackedCollator
from ..packing.encoding import IGNORED, Tokenized
from .index import Index
from .workers import WorkerNotes


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

    def __reduce__(self) -> tuple[Any, ...]:
        """How a worker hands it over: what is small goes through the pipe as numpy."""
        # In shared memory each tensor is an open file, which costs as much time as 100 KB through the pipe.
        inputs = {
            name: values if values.is_floating_point() else values.numpy()
            for name, values in self.inputs.items()
        }
        return _received, (inputs, self.conversations, self.supervised_tokens, self.failed)


def _received(inputs: dict[str, torch.Tensor | np.ndarray], *others: Any) -> DeviceInputs:
    return DeviceInputs({name: torch.as_tensor(values) for name, values in inputs.items()}, *others)


class DeviceBatches:
    """The index as a torch data set: rows of one device batch → `DeviceInputs`, decoding in whatever worker
    asks.

    Args:
        index: the rows.
        collator: lays a device batch out.
        notes: where a worker process writes what it is at; `None` where there are no workers.
    """

    def __init__(self, index: Index, collator: PackedCollator, notes: WorkerNotes | None = None):
        self.index = index
        self.collator = collator
        self.notes = notes

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Sequence[int]) -> DeviceInputs:
        conversations = [self.index.tokenized(row) for row in rows]
        failed: list[tuple[int, str]] = []
        try:
            inputs = self._collate(conversations)
        except DataError:  # some image cannot be decoded: find out whose, and lay the others out without them
            failed = [
                (row, why) for row, one in zip(rows, conversations, strict=True) if (why := self._fault(one))
            ]
            lost = {row for row, _ in failed}
            conversations = [one for row, one in zip(rows, conversations, strict=True) if row not in lost]
            inputs = self._collate(conversations)
        # labels [rows, tokens] are not shifted: nothing predicts the first token of a row
        supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
        return DeviceInputs(inputs, len(conversations), supervised, tuple(failed))

    def _fault(self, conversation: Tokenized) -> str | None:
        try:
            self._collate([conversation])
        except DataError as error:
            return str(error)
        return None

    def _collate(self, conversations: list[Tokenized]) -> Batch:
        if self.notes is None:
            return self.collator.inputs(conversations)
        # the first that shows it
        shows = {image: one for one in reversed(conversations) for image in one.images}
        batch = ", ".join(one.source for one in conversations)

        def note(image: str) -> None:
            self.notes.write(
                f"{shows[image].source} (id {shows[image].id}), image {image}, in the device batch of {batch}"
            )

        inputs = self.collator.inputs(conversations, note)
        self.notes.clear()
        return inputs

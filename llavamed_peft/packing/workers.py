"""What each data-loading worker is at, kept where it outlives the worker: in shared memory.

A worker that dies in a decoder, or never comes back from one, cannot say which image it was. So each writes it down before it
decodes, some microseconds an image, and the training process reads it when the data loader gives up. Left out: why a worker died.
"""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
from dataclasses import dataclass

import torch
from torch.utils.data import get_worker_info

_HEAD = struct.Struct("=qdH")  # process, time, bytes of the text
_SLOT = 2048  # bytes of a worker; what does not fit is cut


@dataclass(frozen=True, slots=True)
class WorkerNote:
    """What a worker wrote last.

    Args:
        pid: of its process.
        seconds: since it wrote.
        text: what it is at.
    """

    pid: int
    seconds: float
    text: str

    @property
    def is_dead(self) -> bool:
        """Its process, a child of this one, has ended."""
        return self.pid not in {process.pid for process in multiprocessing.active_children()}


class WorkerNotes:
    """One note per worker of a data loader; goes to the workers as part of the data set, by fork or by spawn.

    Args:
        workers: of the data loader.
    """

    def __init__(self, workers: int):
        self._slots = torch.zeros((workers, _SLOT), dtype=torch.uint8).share_memory_()

    def write(self, text: str) -> None:
        """In a worker: what it is at from now on. Elsewhere nothing is written."""
        worker = get_worker_info()
        if worker is not None:
            encoded = text.encode(errors="replace")[: _SLOT - _HEAD.size]
            slot = memoryview(self._slots[worker.id].numpy())
            # The clock is the machine's, the same in every process.
            slot[: _HEAD.size + len(encoded)] = _HEAD.pack(os.getpid(), time.monotonic(), len(encoded)) + encoded

    def clear(self) -> None:
        """In a worker: it is done with what it was at."""
        self.write("")

    def get_on(self, within: float) -> bool:
        """Some worker wrote in the last `within` seconds, and none is at something for longer; those without work are silent."""
        last = max(_HEAD.unpack(slot[: _HEAD.size].tobytes())[1] for slot in self._slots.numpy())
        return time.monotonic() - last <= within and all(note.seconds <= within for note in self.read())

    def read(self) -> list[WorkerNote]:
        """The notes of the workers that are, or were to the last, at something."""
        notes = []
        for slot in self._slots.numpy():
            pid, at, length = _HEAD.unpack(slot[: _HEAD.size].tobytes())
            if length:
                text = slot[_HEAD.size : _HEAD.size + length].tobytes().decode(errors="replace")
                notes.append(WorkerNote(pid, time.monotonic() - at, text))
        return notes

"""Data-loading workers: how many have room in shared memory, and what each is at, kept there so that it
outlives the worker.

A worker that dies in a decoder, or never comes back from one, cannot say which image it was. So each writes
it down before it decodes, some microseconds an image, and the training process reads it when the data loader
gives up. Left out: why a worker died.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

_HEAD = struct.Struct("=qdH")  # process, time, bytes of the text
_SLOT = 2048  # bytes of a worker; what does not fit is cut
_SHARED_MEMORY = Path("/dev/shm")  # where torch lays down, on Linux, what goes from one process to another


def free_shared_memory() -> int | None:
    """Bytes; `None` where the system does not bound it apart from other memory."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def workers_with_room(asked: int, item_bytes: float, free: int | None, processes: int) -> int:
    """How many of the workers asked for can decode ahead: as much as each has ready, the training process
    holds once more.

    Args:
        item_bytes: of what one worker has ready, in the mean: it may be more, so that half of what is free is
            taken.
        free: bytes of shared memory.
        processes: that train on this machine and share it.
    """
    if free is None:
        return asked
    return max(0, min(asked, int(free / 2 / processes // max(item_bytes, 1)) - 1))


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
            slot[: _HEAD.size + len(encoded)] = (
                _HEAD.pack(os.getpid(), time.monotonic(), len(encoded)) + encoded
            )

    def clear(self) -> None:
        """In a worker: it is done with what it was at."""
        self.write("")

    def get_on(self, within: float) -> bool:
        """Some worker wrote in the last `within` seconds, and none is at something for longer; those without
        work are silent."""
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

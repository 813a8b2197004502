"""The data loader of exact optimizer steps, and the workers that decode for it.

One item of the loader is this process's share of one optimizer step, so accelerate has nothing left to shard.
Workers are optional. A worker that dies, or hangs at an image, becomes an error that names the row it was at.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader

from ..errors import TrainingError
from ..packing.collator import PackedCollator
from ..reporting.text import in_bytes
from ..stages import Schedule
from .decoding import DeviceBatches, DeviceInputs
from .index import Index
from .ledger import Ledger
from .signals import StopSignals, prepare_worker, signals_held
from .steps import StepSampler
from .workers import WorkerNote, WorkerNotes, free_shared_memory, workers_with_room

# Seconds that a worker may be at one image: a slow disk takes seconds, a dead one for ever.
HANGS_AFTER = 600.0
# Seconds after which training that waits for data looks whether its workers make progress.
LOOKS_EVERY = 10.0
# torch hands each tensor of a worker over as an open file: 8 workers may have 2,000 under way, and 1,024 is
# the usual limit.
OPEN_FILES = 65_536
# How torch's errors begin; it has no class for them.
_DIED, _TIMED_OUT = "DataLoader worker (pid", "DataLoader timed out"

Loaded = TypeVar("Loaded")


class Use(NamedTuple):
    """What a data loader is for.

    item: what a worker prepares at a time, as a message names it.
    ahead: how many of these each worker prepares ahead.
    """

    item: str
    ahead: int


TRAINING, HELD_OUT, STORING = Use("a step", 1), Use("a held-out step", 1), Use("an image", 2)


class Workers:
    """The processes that decode images for a stage, for each use of them.

    Args:
        asked: workers of a data loader, at most; 0 decodes in the training process.
        stop: of the stage; it keeps signals from the workers while the stage trains.
        show: takes a line where fewer workers start than were asked for.
    """

    def __init__(self, asked: int, stop: StopSignals, show: Callable[[str], object]):
        self.asked, self.stop, self.show = asked, stop, show
        self.started: dict[Use, int] = {}
        self.notes: dict[Use, WorkerNotes] = {}
        if asked:
            _allow_open_files()

    def settings(self, use: Use, item_bytes: Callable[[], float], what: str) -> dict[str, Any]:
        """The settings of a `DataLoader` that decodes ahead.

        The number of workers is decided once for each use: those asked for, or as many as have room.

        Args:
            item_bytes: estimates the bytes of one item, on average.
            what: an item is made of, `"pixels"` or `"features"`, for the message.
        """
        if use not in self.started:
            self.started[use] = self._with_room(use, item_bytes(), what) if self.asked else 0
            if self.started[use]:
                self.notes[use] = WorkerNotes(self.started[use])
        workers = self.started[use]
        return {
            "num_workers": workers,
            "prefetch_factor": use.ahead if workers else None,
            "worker_init_fn": functools.partial(prepare_worker, self.stop.trains),
            "timeout": LOOKS_EVERY if workers else 0,
            # Without its own generator, each epoch and evaluation would draw a number from dropout's.
            "generator": torch.Generator(),
        }

    def _with_room(self, use: Use, item_bytes: float, what: str) -> int:
        free, processes = free_shared_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = workers_with_room(self.asked, use.ahead * item_bytes, free, processes)
        if workers < self.asked:
            shared = f" for {processes} processes" if processes > 1 else ""
            self.show(
                f"{workers} worker{'' if workers == 1 else 's'} instead of {self.asked}: {use.item} has "
                f"about {in_bytes(item_bytes)} of {what}, and /dev/shm has {in_bytes(free)} free{shared}"
            )
        return workers

    def patiently(self, loader: Iterable[Loaded], use: Use) -> Iterator[Loaded]:
        """What a data loader yields, waited for as long as its workers make progress.

        A large step of slow images may take long.

        Raises:
            RuntimeError: torch's: a worker died, or is at one image for longer than `HANGS_AFTER`.
            TrainingError: a worker's.
        """
        with signals_held(loader):
            items = iter(loader)
        asked_at = time.monotonic()
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except TrainingError as error:  # torch wraps a worker's traceback around its words
                words = str(error).rpartition(f"{TrainingError.__module__}.TrainingError: ")[2]
                raise TrainingError(words.strip()) from error
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
                waited = time.monotonic() - asked_at
                if waited > HANGS_AFTER and not self.notes[use].get_on(HANGS_AFTER):
                    raise
            else:
                yield item
                asked_at = time.monotonic()

    @contextlib.contextmanager
    def naming_rows(self, how_to_resume: Callable[[], str]) -> Iterator[None]:
        """Turn the death or hanging of a worker into an error that names the row it was at.

        torch raises a worker's death in whatever the training process does at that moment, not only where it
        asks for data.

        Raises:
            TrainingError: a worker died or hangs.
        """
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError) as error:
            self._wait_for_the_dead(1 if isinstance(error, RuntimeError) else 10)
            notes = self._read_notes()
            ends = [f"died at {note.text}" for note in notes if note.is_dead]
            slow = [note for note in notes if note.seconds > HANGS_AFTER]
            ends += [f"has been at {note.text} for {note.seconds:.0f} s" for note in slow]
            if not ends and not str(error).startswith((_DIED, _TIMED_OUT)):
                raise
            unknown = "hangs" if str(error).startswith(_TIMED_OUT) else "died"
            raise TrainingError(
                f"A worker that decodes images {'; another '.join(ends or [unknown])} "
                f"({str(error).strip()}). Look at the image in a process of its own, and leave the row out "
                "if it is the cause; if memory ran out, take fewer workers (now "
                f"{max(self.started.values())}). {how_to_resume()}"
            ) from error

    def _wait_for_the_dead(self, seconds: float) -> None:
        """Wait until torch knows which worker died; what it had sent is lost some moments earlier."""
        patience = time.monotonic() + seconds
        while self.notes and time.monotonic() < patience:
            if any(note.is_dead for note in self._read_notes()):
                return
            # torch raises what it learns in any call, also in this one
            with contextlib.suppress(RuntimeError):
                time.sleep(0.1)

    def _read_notes(self) -> list[WorkerNote]:
        return [note for notes in self.notes.values() for note in notes.read()]


class ExactSteps:
    """A data set cut into optimizer steps, as this process gets them.

    Args:
        ledger: of the data set.
        collator: lays a device batch out; its `max_row_tokens` bounds one.
        schedule: `global_batch` and `shuffle` are read.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        workers: decode ahead.
        use: of the data loader.
    """

    def __init__(
        self,
        ledger: Ledger,
        collator: PackedCollator,
        schedule: Schedule,
        seed: int,
        rank: int,
        world_size: int,
        workers: Workers,
        use: Use,
    ):
        self.ledger, self.collator, self.schedule, self.seed = ledger, collator, schedule, seed
        self.rank, self.world_size, self.workers, self.use = rank, world_size, workers, use

    @property
    def index(self) -> Index:
        """The rows."""
        return self.ledger.index

    def sampler(self) -> StepSampler:
        """Which rows make which step, on this process."""
        return self.index.sampler(self.collator, self.schedule, self.seed, self.rank, self.world_size)

    def loader(self) -> StepLoader:
        """A data loader of this process's share of every step of an epoch."""
        what = "pixels" if self.collator.features is None else "features"
        settings = self.workers.settings(self.use, self._step_bytes, what)
        return StepLoader(
            DeviceBatches(self.index, self.collator, self.workers.notes.get(self.use)),
            batch_sampler=self.sampler(),
            collate_fn=_as_is,
            **settings,
        )

    def patiently(self, steps: Iterable[list[DeviceInputs]]) -> Iterator[list[DeviceInputs]]:
        """The steps of a loader, waited for as long as its workers make progress; see `Workers.patiently`."""
        return self.workers.patiently(steps, self.use)

    def _step_bytes(self) -> float:
        """Estimated bytes that one share of a step holds of its images: pixels, or stored features."""
        encoder, features = self.collator.encoder, self.collator.features
        tile_bytes = encoder.tile_bytes if features is None else features.tile_bytes
        conversations = max(1, min(self.schedule.global_batch, len(self.index)) / self.world_size)
        return conversations * self.index.mean_tiles(encoder) * tile_bytes


class StepLoader(DataLoader[list[DeviceInputs]]):
    """A data loader whose sampler knows epochs; the trainer tells it through `set_epoch`, which torch's
    lacks."""

    def __iter__(self) -> Any:
        with signals_held(self):
            return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.batch_sampler.set_epoch(epoch)


def _allow_open_files() -> None:
    """Raise this process's own limit of open files as far as it is allowed to, up to `OPEN_FILES`."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if least != resource.RLIM_INFINITY and least < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _as_is(batches: Any) -> Any:
    return batches

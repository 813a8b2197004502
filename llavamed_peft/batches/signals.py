"""SIGTERM and Ctrl-C while a stage trains: noted at once, obeyed where the run can be resumed.

A scheduler that stops a job sends SIGTERM and kills it half a minute later; a person presses Ctrl-C, which
the terminal sends to every process that it started. Neither may tear a step apart: the trainer asks
`StopSignals` between device batches, saves, and raises `Interrupted`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from types import FrameType, TracebackType
from typing import Any

_OBEYED = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_REPEAT = 1.0  # a launcher hands a terminal's Ctrl-C on, so one keystroke may arrive twice


class StopSignals:
    """A context in which SIGTERM and SIGINT do not end the process but set `received`; a second Ctrl-C does
    end it.

    Signals that the process ignores stay ignored, as the shell means it for jobs in the background. Outside
    the main thread, where Python allows no handlers, it does nothing. A signal that nobody has obeyed is
    delivered again at the end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # Shared with data-loader workers, see `prepare_worker`
        self.trains = multiprocessing.RawValue("b", 0)
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _OBEYED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        self.trains.value = 1
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received == signal.SIGINT and now - self._at > _SECONDS_TO_REPEAT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._at = number, now
            # print() may not be entered twice, and the signal may have come in the middle of one
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving, then stopping. Ctrl-C again stops at once.\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.trains.value = 0
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.received is not None:
            signal.raise_signal(self.received)


@contextlib.contextmanager
def signals_held(loader: object) -> Iterator[None]:
    """Let SIGTERM and SIGINT wait while the workers of a data loader are started, in the workers until
    `prepare_worker` can take them.

    Workers of a fork server inherit its mask, not this one, so a signal may still end them while they start.

    Args:
        loader: a torch `DataLoader`; anything else starts no workers.
    """
    if getattr(loader, "num_workers", 0):
        # Both helpers outlive this context and every later process of a fork server inherits its mask, so
        # neither may start inside. (Starting the tracker also unblocks the signals.)
        start = (getattr(loader, "multiprocessing_context", None) or multiprocessing).get_start_method()
        if start != "fork":
            resource_tracker.ensure_running()
        if start == "forkserver":
            forkserver.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OBEYED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(trains: ctypes.c_byte, worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: keep signals from a worker while its trainer trains.

    A terminal and a scheduler signal every process, but the trainer needs its workers until it has saved.
    Afterwards SIGTERM is how Python ends them. Should the trainer die, they notice by themselves.

    Args:
        trains: `StopSignals.trains` of the trainer.
        worker: its number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: None if trains.value else os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OBEYED)

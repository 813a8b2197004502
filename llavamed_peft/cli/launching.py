"""How a script starts and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar

from ..errors import Interrupted, LlavaMedError
from .parsing import parse


def start(main: Callable[..., object], *arguments: type) -> None:
    """Parse the options and call `main` with them.

    Where the package refuses, the process ends with a line on stderr and exit code 1; where it was asked to
    stop, with 143 (SIGTERM) or 130 (Ctrl-C) and a line that says how to resume.

    Of several processes under torchrun the one that fails is named, with its error, in torchrun's last lines.
    """
    parsed = parse(*arguments)
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to programmers
    disable_progress_bar()
    try:
        with _head_start():
            record(main)(*parsed)
    except LlavaMedError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)


def is_main_process() -> bool:
    """Of several processes under a launcher, the one that speaks and writes; a process by itself is it."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _head_start() -> Iterator[None]:
    """Where one of several processes fails, let it stay until its error is the oldest.

    The others fail as soon as it leaves, and torchrun, which counts in whole seconds, names the first.
    """
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(2)

"""How a script starts and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar

from ..errors import Interrupted, LlavaMedError
from .parsing import parse


@dataclass(kw_only=True)
class ScriptArguments:
    """How a script ends."""

    debug: bool = field(default=False, metadata={"help": "show the traceback of an error"})


def start(main: Callable[..., object], *arguments: type) -> None:
    """Parse the options and call `main` with them.

    Where anything fails, the process ends with a sentence on stderr and exit code 1; `--debug` shows the
    traceback. Where it was asked to stop, it ends with 143 (SIGTERM) or 130 (Ctrl-C) and a line that says how
    to resume.

    Of several processes under torchrun the one that fails is named, with its error, in torchrun's last lines.
    """
    *parsed, script = parse(*arguments, ScriptArguments)
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to programmers
    disable_progress_bar()
    try:
        with _head_start():
            record(main)(*parsed)
    except Exception as error:
        if script.debug:
            raise
        sys.exit(in_a_sentence(error))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)


def in_a_sentence(error: Exception) -> str:
    """What a user is told of an error; of one that is not the package's own, where its traceback is."""
    name = f"{type(error).__name__}: "
    if isinstance(error, LlavaMedError):
        return f"{name}{error}"
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "no words")
    return f"{name}{words} (This error is not llavamed-peft's own; --debug shows where it came from.)"


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

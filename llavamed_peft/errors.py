"""The errors a user can meet. Every message says what came, what was wanted and what to do about it.

All of them are `LlavaMedError`, so one `except` clause catches what this package refuses, and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlavaMedError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LlavaMedError, ValueError):
    """A field of a stage, schedule, curriculum or call has a value that cannot be used."""


class DataError(LlavaMedError, ValueError):
    """A data file or a row of it cannot be used; the message names file and row."""


class CheckpointError(LlavaMedError, ValueError):
    """A base checkpoint is of another kind, incomplete, or lacks something that training needs."""


class AdapterError(LlavaMedError, ValueError):
    """A stage folder is incomplete, damaged, or belongs to another model."""


class TrainingError(LlavaMedError, RuntimeError):
    """A stage cannot begin or continue; the stages before it are untouched."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'epochs'?"` where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'epochs'?"` where a known name is near, else the list of the known ones."""
    known = sorted(known)
    return nearest(name, known) or f" Known: {', '.join(known)}."


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, has saved, and can be resumed; the message says from where.

    Like Ctrl-C's own `KeyboardInterrupt` it is no `Exception`: what catches errors lets it pass.

    Args:
        signal_number: `signal.SIGTERM` or `signal.SIGINT`; a script's exit code is by custom 128 + this.
        message: what was done until now and how to resume.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number

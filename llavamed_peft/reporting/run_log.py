"""What a run records and shows while it works: `metrics.jsonl`, and lines on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..storage.whole import write_file
from . import progress
from .progress import named

METRICS = "metrics.jsonl"


class RunLog:
    """The log of a run: records are appended to `metrics.jsonl`, and shown.

    Args:
        folder: of the run.
        stream: where lines are shown. On a terminal a line is replaced by the next one, unless it is to stay;
            elsewhere a new line comes every few seconds.
    """

    def __init__(self, folder: Path, stream: TextIO | None = None):
        self.path = folder / METRICS
        self.stream = sys.stderr if stream is None else stream
        self.shown_at = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        """Append a record of a stage and show it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        finished = record["step"] == record["steps"]
        due = time.monotonic() - self.shown_at > progress.SECONDS_BETWEEN_LINES
        if "eval_loss" in record:
            self.say(
                record["stage"],
                f"{record['step']}/{record['steps']}  held-out loss {record['eval_loss']:.4f}",
            )
        elif finished or self.stream.isatty() or due:
            self.show(progress_line(record), finished)

    def rewind(self, stage: str, records: Sequence[dict[str, Any]]) -> None:
        """Keep only these records of a stage, before it begins or resumes from a checkpoint."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if (record := _record(line)) is not None and record["stage"] != stage]
        write_file(self.path, "".join(line + "\n" for line in [*kept, *map(json.dumps, records)]))

    def say(self, name: str, text: str) -> None:
        """Show a line about a stage that stays."""
        self.show(named(name, text), True)

    def show(self, line: str, keep: bool) -> None:
        """Show a line; on a terminal the next one takes its place, unless it is to stay."""
        self.shown_at = time.monotonic()
        if self.stream.isatty():
            self.stream.write(f"\r\033[K{line}" + ("\n" if keep else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def _record(line: str) -> dict[str, Any] | None:
    """What a line says; `None` for the last one of a run that was killed or whose disk was full."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record


def progress_line(record: dict[str, Any]) -> str:
    """A record as a line: step, loss, learning rates, speed, share of the time spent waiting, time left.

    Waiting is the share of the time so far in which the model had no data; without workers, images are
    decoded in it.
    """
    names = [name for name in record if name.endswith("_learning_rate")]
    rates = ", ".join(
        f"{name.removesuffix('_learning_rate').replace('_', ' ')} {record[name]:.1e}" for name in names
    )
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    return named(
        record["stage"],
        f"{record['step']}/{record['steps']}  loss {record['loss']:.4f}  learning rate {rates}  "
        f"{record['conversations_per_second']:.1f} conversations/s  "
        f"{record['supervised_tokens_per_second']:.0f} supervised tokens/s  "
        f"waiting {record['waiting_share']:.0%}  {minutes}:{seconds:02d} left",
    )

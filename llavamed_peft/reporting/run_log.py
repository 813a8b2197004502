"""What a run shows: a progress line while it trains, `metrics.jsonl`, a loss curve and a table of the stages at its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..storage.whole import write_file

if TYPE_CHECKING:
    pass


METRICS = "metrics.jsonl"


_SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """Records of a run: appended to `metrics.jsonl`, and the latest shown as one line.

    Args:
        folder: of the run.
        stream: where the line is shown; on a terminal it is rewritten in place, elsewhere a new one comes every few seconds.
    """

    def __init__(self, folder: Path, stream: TextIO | None = None):
        self.path = folder / METRICS
        self.stream = sys.stderr if stream is None else stream
        self.shown = 0.0

    def __call__(self, record: dict[str, Any]) -> None:
        """Append a record and show it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        finished = record["step"] == record["steps"]
        if "eval_loss" in record:
            self.show(
                f"{record['stage']:<10} {record['step']}/{record['steps']}  held-out loss {record['eval_loss']:.4f}",
                True,
            )
        elif finished or self.stream.isatty() or time.monotonic() - self.shown > _SECONDS_BETWEEN_LINES:
            self.show(progress_line(record), finished)

    def rewind(self, stage: str, records: Sequence[dict[str, Any]]) -> None:
        """Let the file hold these records of a stage and no later ones, before it goes on from a checkpoint or begins."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if (record := _record(line)) is not None and record["stage"] != stage]
        write_file(self.path, "".join(line + "\n" for line in [*kept, *map(json.dumps, records)]))

    def show(self, line: str, keep: bool) -> None:
        """Show a line; the next one takes its place on a terminal, unless it is kept."""
        self.shown = time.monotonic()
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
    """`align 12/100  loss 2.3100  learning rate projector 1.9e-03  34.1 conversations/s  … waiting 2%  0:41 left`.

    Waiting is the share of the time so far in which the model had no data: without workers they are decoded meanwhile.
    """
    names = [name for name in record if name.endswith("_learning_rate")]
    rates = ", ".join(
        f"{name.removesuffix('_learning_rate').replace('_', ' ')} {record[name]:.1e}" for name in names
    )
    minutes, seconds = divmod(round(record["seconds_left"]), 60)
    return (
        f"{record['stage']:<10} {record['step']}/{record['steps']}  loss {record['loss']:.4f}  learning rate {rates}  "
        f"{record['conversations_per_second']:.1f} conversations/s  "
        f"{record['supervised_tokens_per_second']:.0f} supervised tokens/s  waiting {record['waiting_share']:.0%}  "
        f"{minutes}:{seconds:02d} left"
    )

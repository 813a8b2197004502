"""Lines about what a run is doing: one format, and how often they come."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 5.0
Show = Callable[[str, bool], object]  # takes a line, and whether it stays when the next one comes


def named(name: str, text: str) -> str:
    """`align      text`: a line about a stage, or about another part of a run."""
    return f"{name:<10} {text}"


class Progress:
    """Lines about work that may take long: one every few seconds, and the last one stays.

    Args:
        name: of what is worked on.
        show: takes the lines; `None`: nothing is shown.
    """

    def __init__(self, name: str, show: Show | None):
        self.name, self.show = name, show
        self.began = self.shown_at = time.monotonic()

    def __call__(self, text: str, last: bool = False) -> None:
        """Say how far the work is, if a line is due or this is the last one."""
        if last or time.monotonic() - self.shown_at > SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            if self.show is not None:
                self.show(named(self.name, text), last)

    @property
    def has_spoken(self) -> bool:
        """Whether the work took long enough for a line."""
        return self.shown_at > self.began

    def per_second(self, done: int) -> float:
        """How much is done in a second, since the work began."""
        return done / (time.monotonic() - self.began)

"""Runs the pairs of a work, each run in a process of its own, and checks that both sides do equal work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packing_data import Drawer
from packing_runs import RUNS, Run
from packing_works import ARMS, SAME_LOSS, WORKS, Work
from workbench import (
    run_apart,
)


class Bench:
    """Runs what is asked for, each run once.

    Args:
        folder: holds the checkpoint.
        drawer: of the data.
        conversations: of a step; `None`: the work's.
        device_batches: of TRL's, to choose from.
    """

    def __init__(
        self, folder: Path, drawer: Drawer, conversations: int | None, device_batches: Sequence[int]
    ):
        self.folder, self.drawer, self.conversations, self.device_batches = (
            folder,
            drawer,
            conversations,
            device_batches,
        )
        self.done: dict[tuple[str, str, int], Run] = {}  # of (data, arm, pair)
        self.probed: dict[str, list[Run]] = {}  # of a data's kind: what TRL's settings gave

    def of(self, name: str, arm: str) -> list[Run]:
        """The runs of a work's arm, in pairs' order."""
        return [
            found for (data, ran, _), found in self.done.items() if (data, ran) == (WORKS[name].data, arm)
        ]

    def run_pair(self, name: str, pair: int) -> None:
        """Both sides, in alternating order, and what explains them; a check that they did the same work."""
        work = WORKS[name]
        against = list(work.least) or ["trl"]
        arms = [work.ours, *against][:: 1 if pair % 2 == 0 else -1]
        for arm in [*arms, *(work.explained_by if pair == 0 else ())]:
            if (work.data, arm, pair) not in self.done:
                self.done[work.data, arm, pair] = self.run(name, arm, pair)
        for what, bound in (("loss_first", SAME_LOSS), ("trainable_parameters", 0)):
            ours, other = (self.done[work.data, arm, pair][what] for arm in (work.ours, "trl"))
            if abs(ours - other) > bound:
                sys.exit(
                    f"{name}: the sides do not do the same work: {what} is {ours} in ours, {other} in TRL's."
                )

    def run(self, name: str, arm: str, pair: int) -> Run:
        """One run in a process of its own."""
        work, (label, side, how) = WORKS[name], ARMS[arm]
        conversations = self.conversations or work.conversations
        steps = 2 if arm in work.explained_by else work.steps if side == "ours" else 1
        if side == "trl":
            how = self._best(work) | how
            # Something must be left after the warm-up
            how["device_batch"] = min(how["device_batch"], conversations // 2)
        found = self._start(side, how, work.data, pair, conversations, steps)
        line = f"{found['per_second']:.3f} questions/s, {found['peak_mb']:,.0f} MB"
        print(f"pair {pair + 1}, {work.data}, {label}: {line}", file=sys.stderr)
        return found

    def _best(self, work: Work) -> dict[str, Any]:
        """TRL's fastest device batch and number of workers, over the first quarter of a step."""
        kind = {"instruct": "dialogues and captions", "align": "dialogues and captions"}.get(
            work.data, "questions"
        )
        if kind not in self.probed:
            some = max(2, (self.conversations or work.conversations) // 4)
            tried: list[Run] = []
            for workers in (0, 1):
                sizes = [size for size in self.device_batches if size <= some]
                if workers:
                    sizes = [max(tried, key=lambda found: found["per_second"])["device_batch"]]
                for size in sizes:
                    settings = {"device_batch": size, "workers": workers}
                    found = self._start("trl", ARMS["trl"].how | settings, work.data, 0, some, 2)
                    tried.append(
                        settings | {key: found[key] for key in ("per_second", "per_cpu_second", "peak_mb")}
                    )
                    print(f"probe of {kind}: {tried[-1]}", file=sys.stderr)
            self.probed[kind] = tried
        fastest = max(self.probed[kind], key=lambda found: found["per_second"])
        return {key: fastest[key] for key in ("device_batch", "workers")}

    def _start(
        self, side: str, how: dict[str, Any], data: str, step: int, conversations: int, steps: int
    ) -> Run:
        path, images = self.drawer.write(data, step, conversations)
        run = {"side": side, "how": how, "steps": steps, "epochs": steps, "conversations": conversations}
        places = {"folder": str(self.folder), "file": str(path), "images": str(images)}
        return run_apart(str(RUNS), [json.dumps(run | places)])

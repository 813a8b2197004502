"""Saving a stage while it trains, and giving it back what was saved.

`checkpoints.py` says what is in a checkpoint's folder and writes it; this decides when there is something to
save, collects it from all processes, and restores it bit for bit. The order of the data is in no checkpoint:
it is a function of seed, epoch and step, so a hash of the rows suffices to know that it is the same.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import set_seed

from ..batches.index import Index
from ..batches.ledger import Ledger
from ..errors import TrainingError
from ..modeling.tensors import Tensors, trainable_tensors
from ..reporting.run_log import RunLog
from ..stages import Stage
from .checkpoints import (
    Checkpoint,
    how_to_resume,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from .metrics import Counted, Measured


class Checkpointing:
    """Saves one stage into a folder, and restores it from there. All processes make one and call it together.

    Args:
        folder: of the stage's checkpoints.
        resumed: the checkpoint that the stage resumes from; `None`: it begins.
        enabled: False under DeepSpeed, whose optimizer has shards of its own: such a stage begins again.
        stage: what trains.
        train, held_out: the ledgers of its data; get back the rows that failed before.
        measured: gets back what was measured before.
        run_log: shows what a checkpoint costs.
        begins_with: content hashes of what the stage began with, see `Checkpoint.began_with`.

    Raises:
        TrainingError: the stage cannot be resumed under DeepSpeed, or the usable rows are not those that it
            was trained on.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Checkpoint | None,
        *,
        enabled: bool,
        stage: Stage,
        train: Ledger,
        held_out: Ledger | None,
        measured: Measured,
        run_log: RunLog,
        begins_with: Mapping[str, str | None],
    ):
        self.folder, self.resumed, self.enabled = folder, resumed, enabled
        self.stage, self.measured, self.run_log = stage, measured, run_log
        self.ledgers = {"train": train, "eval": held_out}  # as a checkpoint names them
        self.order = order_of(train.index)
        self.processes = PartialState()
        self.saved_at = 0 if resumed is None else resumed.step
        self.begins_with = dict(begins_with)
        self._cost_shown = False
        if resumed is not None:
            self._restore_counts(resumed)

    def _restore_counts(self, checkpoint: Checkpoint) -> None:
        if not self.enabled:
            raise TrainingError(
                f"{checkpoint.path}: was saved without DeepSpeed, which cannot resume from it. Launch as "
                f"before, with FSDP2 or plainly, or remove {self.folder} to train the stage from its "
                "beginning."
            )
        state = checkpoint.state
        if state["order"] != self.order:
            raise TrainingError(
                f"{checkpoint.path}: was trained on rows other than those usable now. Have images changed? "
                "Put them back and make the same call again, or choose another output_dir."
            )
        # The trainer's own counting starts at 0 in every call; ours continues.
        self.measured.counted = Counted(**state["counted"])
        self.measured.history = list(state["history"])
        for name, ledger in self.ledgers.items():
            if ledger is not None:
                ledger.failed.update({row: reason for row, reason in state["failed"][name]})

    def has_news(self, step: int) -> bool:
        """Whether something was learnt since the stage was saved.

        A step of which no image could be decoded does not count: their disk may be gone.
        """
        return self.enabled and step > self.saved_at and self.measured.step_supervised_tokens > 0

    def save(self, step: int, model: nn.Module, optimizer: Any, scheduler: Any, rng: dict[str, Any]) -> int:
        """Save the stage after a step.

        Args:
            step: optimizer steps taken.
            rng: this process's random numbers at the end of the step, from `rng_state`.

        Returns:
            The size in bytes; 0 where another process writes.

        Raises:
            TrainingError: a tensor is not finite, or the folder cannot be written.
        """
        began, training_seconds, size = time.monotonic(), self.measured.seconds(), 0
        # Sharded tensors are gathered, so every process takes part; only the main one gets them.
        tensors, optimizer_state = trainable_tensors(model), optimizer_tensors(model, optimizer)
        rngs = gather_object([rng])
        if self.processes.is_main_process:
            self._refuse_broken(step, tensors)  # a checkpoint of these would be resumed from for ever
            state = {
                "order": self.order,
                "begins_with": self.begins_with,
                "counted": asdict(self.measured.counted),
                "training_seconds": training_seconds,
                "history": self.measured.history,
                "failed": {
                    name: [] if ledger is None else sorted(ledger.failed.items())
                    for name, ledger in self.ledgers.items()
                },
                "scheduler": scheduler.state_dict(),
                "rng": rngs,
            }
            size = save_checkpoint(self.folder, step, tensors, optimizer_state, state)
        self.processes.wait_for_everyone()  # none trains on before it is on the disk
        self.saved_at = step
        self.measured.counted.checkpoint_seconds += time.monotonic() - began
        return size

    def save_on_schedule(
        self, step: int, every: int, model: nn.Module, optimizer: Any, scheduler: Any
    ) -> None:
        """Save the stage if there is something new, and the first time say what that costs.

        Args:
            step: optimizer steps taken.
            every: optimizer steps between two checkpoints.
        """
        if not self.has_news(step):
            return
        counted = self.measured.counted
        before = counted.checkpoint_seconds
        size = self.save(step, model, optimizer, scheduler, rng_state())
        seconds = counted.checkpoint_seconds - before
        if not self._cost_shown and self.processes.is_main_process:
            # of the time between two checkpoints: this one, and `every` steps as long as those so far
            share = seconds / (seconds + every * self.measured.seconds() / step)
            steps = "every step" if every == 1 else f"every {every} steps"
            self.run_log.say(
                self.stage.name,
                f"a checkpoint {steps} (save_steps) costs {seconds:.2f} s, {share:.1%} "
                f"of the time, and {size / 1e6:,.1f} MB; two are kept",
            )
        self._cost_shown = True

    def restore_optimizer(self, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Give the optimizer and the learning rates back what was saved; nothing where the stage begins."""
        if self.resumed is None:
            return
        load_optimizer_tensors(model, optimizer, self.resumed.optimizer())
        scheduler.load_state_dict(self.resumed.state["scheduler"])
        # A scheduler sets rates only when it steps, after the first step of this call.
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def restore_random_numbers(self, seed: int) -> None:
        """Give this process the random numbers that it had when the stage was saved.

        Args:
            seed: of the run; another number of processes draws new numbers from it.

        Warns:
            UserWarning: another number of processes resumes, and dropout draws other numbers.
        """
        if self.resumed is None:
            return
        rngs = self.resumed.state["rng"]
        rank, processes = self.processes.process_index, self.processes.num_processes
        if len(rngs) == processes:
            set_rng_state(rngs[rank])
            return
        # Each process needs numbers of its own, and the same ones whenever this number of processes resumes.
        if self.stage.lora is not None and self.stage.lora.dropout > 0:
            warnings.warn(
                f"{self.resumed.path} was saved by {len(rngs)} process(es) and {processes} resume: dropout "
                "draws other numbers than it would have.",
                stacklevel=2,
            )
        set_seed(int(np.random.SeedSequence([seed, self.resumed.step, rank]).generate_state(1)[0]))

    def seconds_before(self) -> float:
        """Seconds of training in earlier calls."""
        return 0.0 if self.resumed is None else self.resumed.state["training_seconds"]

    def how_to_resume(self) -> str:
        """What the same call would resume from, in a sentence."""
        return how_to_resume(self.folder)

    def would_recur(self) -> str:
        """What to do about a fault that the same call would meet again."""
        return (
            "The same call would meet this again: lower learning_rate or look for odd data, in another "
            "output_dir. Nothing of this stage was written under its name; its checkpoints and the stages "
            "before it are intact."
        )

    def _refuse_broken(self, step: int, tensors: Tensors) -> None:
        if broken := not_finite(tensors):
            raise TrainingError(
                f"After step {step} {len(broken)} of {len(tensors)} tensors are not finite ({broken[0]}). "
                f"{self.would_recur()}"
            )


def not_finite(tensors: Tensors) -> list[str]:
    """The names of the tensors that hold infinity or NaN."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def order_of(index: Index) -> str:
    """A hash of what decides the order of the data and how steps are packed: the rows' lengths, groups and
    beginnings, images before the first answer included; not where the images are."""
    digest = hashlib.sha256()
    for name in ("length", "group", "prefix_tokens", "prefix"):
        digest.update(np.ascontiguousarray(index.column(name), dtype=np.int64).tobytes())
    return digest.hexdigest()

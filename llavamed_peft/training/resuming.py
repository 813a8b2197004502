"""`ResumableTrainer`: a trainer that saves itself whole, goes on bit for bit, and stops when it is asked to.

The Hugging Face trainer can resume too, but saves the model's state dict instead of what a stage trains, takes the newest
checkpoint without looking whether it is whole, and evaluates before it saves. Its loop is used as it is; what it would load
and save is ours. An epoch is entered in its middle by passing over the sampler's
steps, so that no image is decoded for it.
"""

from __future__ import annotations

import hashlib
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate.utils import gather_object
from torch import nn
from transformers import set_seed
from trl import SFTTrainer

from ..batches.index import Index
from ..batches.signals import StopSignals
from ..errors import Interrupted, TrainingError
from ..modeling.tensors import Tensors, trainable_tensors
from ..reporting.run_log import RunLog
from ..stages import Stage
from .checkpoints import (
    Checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
    standing,
)

# What a checkpoint keeps of the trainer's own counting, beside the trainer's state.
_COUNTED = (
    "seen_conversations",
    "seen_supervised_tokens",
    "evaluated_at",
    "evaluation_due",
    "evaluation_seconds",
    "checkpoint_seconds",
    "waiting_seconds",
    "features_seconds",
)


# Methods of the trainer, not documented, that are taken over here.
_TAKEN_OVER = (
    "_init_training_state",
    "_prepare_for_training",
    "_run_epoch",
    "_load_rng_state",
    "_maybe_log_save_evaluate",
)


class ResumableTrainer(SFTTrainer):
    """TRL's trainer with checkpoints of ours. How a step is taken and the held-out loss measured is the subclass's.

    Args:
        stage: what trains.
        train_index, eval_index: the data.
        settings: of the trainer.

    Raises:
        TrainingError: the installed trainer lacks a method that is taken over.
    """

    def __init__(self, stage: Stage, train_index: Index, eval_index: Index | None, **settings: Any):
        if missing := [name for name in _TAKEN_OVER if not hasattr(SFTTrainer, name)]:
            raise TrainingError(
                f"The trainer of transformers {transformers.__version__} and trl {trl.__version__} has no {', '.join(missing)}, "
                "so a stage could not be saved and gone on with; wanted transformers 5.23 and trl 1.16 (constraints.txt)."
            )
        self.stage, self.schedule = stage, stage.schedule
        self.train_index, self.eval_index = train_index, eval_index
        self.stop = StopSignals()
        self.checkpoint: Checkpoint | None = None  # where training begins
        self.checkpoint_folder: Path | None = None
        self.run_log: RunLog | None = None
        self.history: list[dict[str, Any]] = []  # the records of the stage so far
        self.seen_conversations = 0
        self.seen_supervised_tokens = 0
        self.step_supervised_tokens = 0  # of the step just taken, over all processes
        self.evaluated_at = -1
        self.evaluation_due = False  # behind the step just taken
        self.evaluation_seconds = 0.0
        self.checkpoint_seconds = 0.0
        self.waiting_seconds = 0.0  # for the next step's data
        self.features_seconds = 0.0  # before the first step, to store or check the feature cache
        self._began = time.monotonic()
        self._saved_at = 0
        self._cost_shown = False
        super().__init__(**settings)

    def begin_from(self, folder: Path, checkpoint: Checkpoint | None, run_log: RunLog) -> None:
        """Save into `folder`, and begin at the checkpoint, where there is one.

        Raises:
            TrainingError: the rows that can be used are not those it was trained on, or DeepSpeed runs.
        """
        self.checkpoint_folder, self.checkpoint, self.run_log = (folder, checkpoint, run_log)
        self.args.eval_on_start = self.eval_index is not None
        if checkpoint is None:
            return
        if not self.saves:
            raise TrainingError(
                f"{checkpoint.path}: was saved without DeepSpeed, which cannot go on from it. Launch as before, with FSDP2 or "
                f"plainly, or remove {folder} to train the stage from its beginning."
            )
        state = checkpoint.state
        if state["order"] != self._order():
            raise TrainingError(
                f"{checkpoint.path}: was trained on other rows than can be used now. Have images changed? Put them "
                "back and make the same call again, or choose another output_dir."
            )
        for name in _COUNTED:
            setattr(self, name, state["counted"][name])
        self.history = list(state["history"])
        self._saved_at = checkpoint.step
        self.args.eval_on_start = self.evaluation_due
        for index, failed in (
            (self.train_index, state["failed"]["train"]),
            (self.eval_index, state["failed"]["eval"]),
        ):
            if index is not None:
                index.failed.update({row: reason for row, reason in failed})

    @property
    def saves(self) -> bool:
        """Whether the stage is saved while it trains. Under DeepSpeed, whose optimizer has shards of its own, it begins again."""
        return not self.is_deepspeed_enabled

    def training_seconds(self) -> float:
        """Wall time since training began, without evaluation and checkpoints, and without pauses between calls."""
        return time.monotonic() - self._began - self.evaluation_seconds - self.checkpoint_seconds

    def agree_on_stopping(self, *numbers: int) -> list[int]:
        """Sum numbers over the processes and learn whether any of them was asked to stop; then all save and stop, here.

        Raises:
            Interrupted: one was asked.
        """
        local = [*numbers, int(self.stop.received is not None)]
        if self.accelerator.num_processes > 1:
            local = self.accelerator.reduce(torch.tensor(local, device=self.args.device), "sum").tolist()
        *sums, asked = local
        if asked:
            self.save_and_stop(rng_state())
        return sums

    def save_and_stop(self, rng: dict[str, Any]) -> None:
        """Save the step that was finished last, at whose end the random numbers stood at `rng`. All processes call it.

        Raises:
            Interrupted: always.
        """
        step = self.state.global_step
        if self._has_learnt():
            self._write(rng)
        number = self.stop.received or signal.SIGTERM  # another process's, which they all obey
        assert self.checkpoint_folder is not None
        raise Interrupted(
            number,
            f"Stopped by {signal.Signals(number).name} behind step {step} of {self.state.max_steps} of stage "
            f"{self.stage.name!r}. {standing(self.checkpoint_folder)}",
        )

    def _save_on_schedule(self) -> None:
        """Save, and the first time say what that costs."""
        if not self._has_learnt():
            return
        seconds = -self.checkpoint_seconds
        size = self._write(rng_state())
        seconds += self.checkpoint_seconds
        if self.run_log is not None and not self._cost_shown and self.is_world_process_zero():
            steps = self.state.save_steps
            share = seconds / (seconds + steps * self.training_seconds() / self.state.global_step)
            every = "every step" if steps == 1 else f"every {steps} steps"
            self.run_log.show(
                f"{self.stage.name:<10} a checkpoint {every} (save_steps) costs {seconds:.2f} s, {share:.1%} of the time, and "
                f"{size / 1e6:,.1f} MB; two are kept",
                True,
            )
        self._cost_shown = True

    def _has_learnt(self) -> bool:
        """Since it was saved last; a step of which no image could be decoded is none to go on from: their disk may be gone."""
        return self.saves and self.state.global_step > self._saved_at and self.step_supervised_tokens > 0

    def _write(self, rng: dict[str, Any]) -> int:
        """Save the step that was finished last; returns the size in bytes, 0 where another process writes."""
        assert self.checkpoint_folder is not None
        began, training_seconds, size = time.monotonic(), self.training_seconds(), 0
        tensors, optimizer = self._whole_tensors()
        rngs = gather_object([rng])
        failed = {
            name: sorted(index.failed.items()) if index is not None else []
            for name, index in (("train", self.train_index), ("eval", self.eval_index))
        }
        if self.is_world_process_zero():
            self._refuse_broken(tensors)
            state = {
                "order": self._order(),
                "counted": {name: getattr(self, name) for name in _COUNTED},
                "training_seconds": training_seconds,
                "history": self.history,
                "failed": failed,
                "scheduler": self.lr_scheduler.state_dict(),
                "rng": rngs,
            }
            size = save_checkpoint(self.checkpoint_folder, self.state.global_step, tensors, optimizer, state)
        self.accelerator.wait_for_everyone()
        self._saved_at = self.state.global_step
        self.checkpoint_seconds += time.monotonic() - began
        return size

    def _whole_tensors(self) -> tuple[Tensors, Tensors]:
        """What trains and the optimizer's state, on the process that writes. All call it: sharded tensors are gathered."""
        return trainable_tensors(self.model), optimizer_tensors(self.model, self.optimizer)

    def _refuse_broken(self, tensors: Tensors) -> None:
        assert self.checkpoint_folder is not None
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise TrainingError(
                f"After step {self.state.global_step} {len(broken)} of {len(tensors)} tensors are not finite ({broken[0]}). "
                f"{self.would_recur()}"
            )

    def would_recur(self) -> str:
        """What to do about a fault that the same call would meet again."""
        assert self.checkpoint_folder is not None
        return (
            f"Lower learning_rate, or look for odd data, in another output_dir. {standing(self.checkpoint_folder)} It would meet "
            "this again. Nothing of this stage was written under its name, the stages before it are untouched."
        )

    def _order(self) -> str:
        """A hash of the rows' lengths, groups and beginnings as the index found them, images before the first answer included."""
        digest = hashlib.sha256()
        for name in ("length", "group", "prefix_tokens", "prefix"):
            digest.update(np.ascontiguousarray(self.train_index.column(name), dtype=np.int64).tobytes())
        return digest.hexdigest()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume: Any, trial: Any
    ) -> tuple[int, int]:
        beginning = super()._init_training_state(max_steps, steps_per_epoch, epochs, None, trial)
        if self.checkpoint is None:
            return beginning
        step = self.checkpoint.step
        self.state.global_step, self.state.epoch = step, step / steps_per_epoch
        epoch, within = divmod(step, steps_per_epoch)
        return (
            (epoch, within) if step < max_steps else (epochs, 0)
        )  # a part of an epoch would be taken up again

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume: Any
    ) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._began = time.monotonic()
        if self.checkpoint is not None:
            load_optimizer_tensors(self.model, self.optimizer, self.checkpoint.optimizer())
            self.lr_scheduler.load_state_dict(self.checkpoint.state["scheduler"])
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            self._began -= (
                self.checkpoint.state["training_seconds"] + self.evaluation_seconds + self.checkpoint_seconds
            )
        return prepared

    def _run_epoch(self, **settings: Any) -> None:
        # passes over the steps of an epoch that are done, fetches the next, and asks for the random numbers as they stood
        super()._run_epoch(**settings | {"resume_from_checkpoint": self.checkpoint})

    def _load_rng_state(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        rngs, rank, processes = (checkpoint.state["rng"], self.args.process_index, self.args.world_size)
        if len(rngs) == processes:
            set_rng_state(rngs[rank])
            return
        if self.stage.lora is not None and self.stage.lora.dropout > 0:
            warnings.warn(
                f"{checkpoint.path} was saved by {len(rngs)} process(es), {processes} go on: dropout draws other numbers than it "
                "would have.",
                stacklevel=2,
            )
        set_seed(int(np.random.SeedSequence([self.args.seed, checkpoint.step, rank]).generate_state(1)[0]))

    def _maybe_log_save_evaluate(self, *arguments: Any, **settings: Any) -> None:
        """Log, save, and only then evaluate: what is cut off while it evaluates begins with the evaluation again."""
        save_due, self.evaluation_due = (self.control.should_save, self.control.should_evaluate)
        self.control.should_save = self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*arguments, **settings)
        if save_due:
            self._save_on_schedule()
        if self.evaluation_due:
            self.evaluate()

"""What is measured while a stage trains."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from ..reporting.run_log import RunLog


@dataclass(slots=True)
class Counted:
    """What a stage has counted so far, in all calls that it took; checkpoints use these names."""

    seen_conversations: int = 0
    seen_supervised_tokens: int = 0
    evaluated_at: int = -1  # the step after which the held-out loss was measured last
    evaluation_due: bool = False  # after the step just taken
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    waiting_seconds: float = 0.0  # for the next step's data
    features_seconds: float = 0.0  # before the first step, to store or check the feature cache


@dataclass(slots=True)
class Measured:
    """What is measured of a stage; `trainer.py` writes it, `Watch` and checkpoints read it.

    Args:
        counted: kept by checkpoints.
        history: the stage's records so far, as in `metrics.jsonl`; kept by checkpoints.
        rates: part of the model → learning rate of the step just taken.
        step_supervised_tokens: of the step just taken, over all processes.
        unrounded_loss: the held-out loss before what was trained was rounded; `None`: it was not.
    """

    counted: Counted = field(default_factory=Counted)
    history: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    step_supervised_tokens: int = 0
    unrounded_loss: float | None = None
    _began: float = field(default_factory=time.monotonic)

    def begin(self, seconds_before: float) -> None:
        """Training begins now; earlier calls trained for so many seconds."""
        before = seconds_before + self.counted.evaluation_seconds + self.counted.checkpoint_seconds
        self._began = time.monotonic() - before

    def seconds(self) -> float:
        """Wall time of training, without evaluation, checkpoints and pauses between calls."""
        counted = self.counted
        return time.monotonic() - self._began - counted.evaluation_seconds - counted.checkpoint_seconds

    def summary(self, steps: int, trainable: int, cached_images: int) -> dict[str, Any]:
        """What `stage.json` says of the training.

        Args:
            steps: optimizer steps.
            trainable: parameters that train.
            cached_images: images whose features were stored.
        """
        counted, seconds = self.counted, self.seconds()
        losses = [record["loss"] for record in self.history if "loss" in record]
        held_out = [record["eval_loss"] for record in self.history if "eval_loss" in record]
        return {
            "steps": steps,
            "conversations": counted.seen_conversations,
            "supervised_tokens": counted.seen_supervised_tokens,
            "seconds": round(seconds, 2),
            "evaluation_seconds": round(counted.evaluation_seconds, 2),
            "checkpoint_seconds": round(counted.checkpoint_seconds, 2),
            "waiting_seconds": round(counted.waiting_seconds, 2),
            "features_seconds": round(counted.features_seconds, 2),
            "conversations_per_second": round(counted.seen_conversations / seconds, 3),
            "trainable_parameters": trainable,
            "cached_images": cached_images,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "eval_loss_before": held_out[0] if held_out else None,
            "eval_loss_after": held_out[-1] if held_out else None,
            **({} if self.unrounded_loss is None else {"eval_loss_unrounded": self.unrounded_loss}),
        }

    def last_held_out_loss(self) -> float | None:
        """The one measured last."""
        return next((record["eval_loss"] for record in reversed(self.history) if "eval_loss" in record), None)


class Watch(TrainerCallback):
    """Turns the trainer's logs into records: losses, rates, conversations and tokens per second, time left.

    Args:
        stage: its name.
        measured: of the stage; gets each record.
        run_log: of the run; gets each record in the main process.
    """

    def __init__(self, stage: str, measured: Measured, run_log: RunLog):
        self.stage, self.measured, self.run_log = stage, measured, run_log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """`transformers.TrainerCallback.on_log`."""
        measured, counted = self.measured, self.measured.counted
        record: dict[str, Any] = {"stage": self.stage, "step": state.global_step, "steps": state.max_steps}
        if "eval_loss" in logs:
            record["eval_loss"] = logs["eval_loss"]
        # Without: none of its images could be decoded
        elif "loss" in logs and measured.step_supervised_tokens:
            seconds = measured.seconds()
            left = seconds / state.global_step * (state.max_steps - state.global_step)
            record["epoch"] = round(state.epoch, 4)
            record["loss"] = logs["loss"]
            record["grad_norm"] = logs.get("grad_norm")
            record |= {f"{part}_learning_rate": rate for part, rate in measured.rates.items()}
            record["conversations_per_second"] = round(counted.seen_conversations / seconds, 3)
            record["supervised_tokens_per_second"] = round(counted.seen_supervised_tokens / seconds, 3)
            record["waiting_share"] = round(counted.waiting_seconds / seconds, 4)
            record["seconds"] = round(seconds, 3)
            record["seconds_left"] = round(left, 1)
        else:
            return
        measured.history.append(record)
        if state.is_world_process_zero:
            self.run_log(record)

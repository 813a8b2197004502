"""What is measured while a stage trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..reporting.run_log import RunLog
from .trainer import StageTrainer


class Watch(TrainerCallback):
    """Turns the trainer's logs into records: losses, rates, conversations and tokens per second, time left."""

    def __init__(self, trainer: StageTrainer, run_log: RunLog):
        self.trainer = trainer
        self.run_log = run_log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        record: dict[str, Any] = {
            "stage": self.trainer.stage.name,
            "step": state.global_step,
            "steps": state.max_steps,
        }
        if "eval_loss" in logs:
            record["eval_loss"] = logs["eval_loss"]
        elif (
            "loss" in logs and self.trainer.step_supervised_tokens
        ):  # else none of its images could be decoded
            seconds = self.trainer.training_seconds()
            record["epoch"] = round(state.epoch, 4)
            record["loss"] = logs["loss"]
            record["grad_norm"] = logs.get("grad_norm")
            record |= {f"{part}_learning_rate": rate for part, rate in self.trainer.rates.items()}
            record["conversations_per_second"] = round(self.trainer.seen_conversations / seconds, 3)
            record["supervised_tokens_per_second"] = round(self.trainer.seen_supervised_tokens / seconds, 3)
            record["waiting_share"] = round(self.trainer.waiting_seconds / seconds, 4)
            record["seconds"] = round(seconds, 3)
            record["seconds_left"] = round(
                seconds / state.global_step * (state.max_steps - state.global_step), 1
            )
        else:
            return
        self.trainer.history.append(record)
        if self.trainer.is_world_process_zero():
            self.run_log(record)


def summary(trainer: StageTrainer, trainable: int) -> dict[str, Any]:
    """What `stage.json` says of the training, of all calls that it took."""
    losses = [record["loss"] for record in trainer.history if "loss" in record]
    held_out = [record["eval_loss"] for record in trainer.history if "eval_loss" in record]
    seconds = trainer.training_seconds()
    return {
        "steps": trainer.state.global_step,
        "conversations": trainer.seen_conversations,
        "supervised_tokens": trainer.seen_supervised_tokens,
        "seconds": round(seconds, 2),
        "evaluation_seconds": round(trainer.evaluation_seconds, 2),
        "checkpoint_seconds": round(trainer.checkpoint_seconds, 2),
        "waiting_seconds": round(trainer.waiting_seconds, 2),
        "features_seconds": round(trainer.features_seconds, 2),
        "conversations_per_second": round(trainer.seen_conversations / seconds, 3),
        "trainable_parameters": trainable,
        "cached_images": 0 if trainer.collator.features is None else len(trainer.collator.features),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_loss_before": held_out[0] if held_out else None,
        "eval_loss_after": held_out[-1] if held_out else None,
    }

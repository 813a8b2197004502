"""TRL's `SFTTrainer` over exact optimizer steps of conversations: the one subclass, for every stage.

The trainer's loop is used as it is; only hooks are overridden. One item of the data loader is this process's
share of one optimizer step, a list of device batches, so `gradient_accumulation_steps` is 1. The loss of a
step is the mean over all of its supervised tokens, however they are cut into device batches, and logits are
computed at supervised positions only. The trainer's own checkpoints hold the model's state dict, are taken as
they are found, and come after the evaluation; ours hold what trains, are checked, and come before it
(`checkpointing.py`).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
import trl
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from ..batches.decoding import DeviceInputs
from ..batches.loader import ExactSteps
from ..batches.signals import StopSignals
from ..errors import Interrupted, TrainingError
from ..modeling.parts import bare
from ..packing.encoding import IGNORED
from ..packing.masks import attention_inputs
from ..stages import Stage
from .checkpointing import Checkpointing
from .checkpoints import rng_state
from .metrics import Measured
from .optimizer import parameter_groups

# Undocumented methods of the Hugging Face trainer that are overridden here; tests/test_compatibility.py pins
# them.
UNDOCUMENTED = (
    "_init_training_state",
    "_prepare_for_training",
    "_run_epoch",
    "_load_rng_state",
    "_maybe_log_save_evaluate",
)


class StepTotals(NamedTuple):
    """Of one step, over all processes."""

    conversations: int
    supervised_tokens: int
    newly_failed: int  # rows whose images could not be decoded
    asked_to_stop: int  # processes that got a signal


class StageTrainer(SFTTrainer):
    """Trains a stage.

    Args:
        model: with the stage's trainable parameters.
        config: the trainer's settings.
        processor: the stage's.
        stage: its learning rates are read.
        train: the steps to learn from.
        held_out: the steps to measure the held-out loss on; `None`: none is measured.
        checkpointing: saves the stage, and knows where it resumes.
        measured: takes what is counted and timed.
        stop: notes SIGTERM and Ctrl-C.

    Raises:
        TrainingError: the installed trainer lacks a method that is overridden.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SFTConfig,
        processor: ProcessorMixin,
        stage: Stage,
        train: ExactSteps,
        held_out: ExactSteps | None,
        checkpointing: Checkpointing,
        measured: Measured,
        stop: StopSignals,
    ):
        if missing := [name for name in UNDOCUMENTED if not hasattr(SFTTrainer, name)]:
            raise TrainingError(
                f"The trainer of transformers {transformers.__version__} and trl {trl.__version__} has no "
                f"{', '.join(missing)}, so a stage could not be saved and resumed; wanted transformers 5.23 "
                "and trl 1.16 (constraints.txt)."
            )
        self.stage, self.train_steps, self.held_out_steps = stage, train, held_out
        self.checkpointing, self.measured, self.stop = checkpointing, measured, stop
        super().__init__(
            model=model,
            args=config,
            data_collator=_as_is,
            train_dataset=train.index.rows,
            eval_dataset=None if held_out is None else held_out.index.rows,
            processing_class=processor,
        )
        resumed = checkpointing.resumed is not None
        self.args.eval_on_start = measured.counted.evaluation_due if resumed else held_out is not None

    # The data: one item of the loader is one process's share of one step.

    def get_train_dataloader(self) -> DataLoader[list[DeviceInputs]]:
        """`Trainer.get_train_dataloader`: not prepared by accelerate, which would shard the steps again."""
        return self.train_steps.loader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[DeviceInputs]], num_batches: int, device: torch.device
    ) -> tuple[list[list[DeviceInputs]], Any]:
        """`Trainer.get_batch_samples`: waits for slow workers, and measures how long the model waits."""
        began = time.monotonic()
        steps = self.train_steps.patiently(epoch_iterator)
        samples = super().get_batch_samples(steps, num_batches, device)
        self.measured.counted.waiting_seconds += time.monotonic() - began
        return samples

    # The step and the held-out loss.

    def training_step(
        self, model: nn.Module, inputs: list[DeviceInputs], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """`Trainer.training_step`: the gradient of one optimizer step, device batch by device batch.

        Args:
            inputs: this process's device batches of the step; as many on every process, some may be empty.

        Returns:
            This process's part of the step's loss, a scalar: the mean over the processes is the step's.

        Raises:
            Interrupted: a process was asked to stop.
            TrainingError: too many rows failed, or the loss is not finite.
        """
        model.train()
        before = rng_state()  # as the step before it ended: what a checkpoint of that step needs
        totals = self._totals(inputs, self.train_steps)
        if totals.asked_to_stop:
            self.save_and_stop(before)
        if totals.newly_failed:
            self._record_failures(inputs, self.train_steps)
        self.measured.step_supervised_tokens = totals.supervised_tokens
        self.measured.rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        # DDP averages gradients over processes. The step's loss is a mean over tokens, wherever they are, so
        # each sum of losses is divided by all of the step's tokens and multiplied by the number of processes.
        scale = self.accelerator.num_processes / max(totals.supervised_tokens, 1)
        total = torch.zeros((), device=self.args.device)
        for position, batch in enumerate(inputs):
            if self.stop.received and self.accelerator.num_processes == 1:  # several agree between steps
                self.save_and_stop(before)
            last = position == len(inputs) - 1
            self.accelerator.sync_gradients = last  # DeepSpeed takes its step where this is true
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self._summed_loss(model, batch) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
            del loss  # or its graph's memory would still be held while the next batch runs forward
        if not torch.isfinite(total):
            raise TrainingError(
                f"The loss of step {self.state.global_step + 1} is {total.item()}. "
                f"{self.checkpointing.would_recur()}"
            )
        if totals.supervised_tokens == 0:  # no image of the step could be decoded
            # Else AdamW's momentum and decay would move the weights all the same. DeepSpeed keeps its own.
            for parameter in model.parameters():
                parameter.grad = None
        self.measured.counted.seen_conversations += totals.conversations
        self.measured.counted.seen_supervised_tokens += totals.supervised_tokens
        return total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`Trainer.evaluate`: the mean loss over all supervised tokens of the held-out data.

        Raises:
            Interrupted: a process was asked to stop.
            TrainingError: too many rows failed.
        """
        steps = self.held_out_steps
        if steps is None:
            raise TrainingError(f"Stage {self.stage.name!r} has no held-out data to measure a loss on.")
        began = time.monotonic()
        model = self.model_wrapped
        model.eval()
        summed = torch.zeros((), dtype=torch.float64, device=self.args.device)
        supervised = 0  # tokens, over all processes
        with torch.no_grad():
            for inputs in steps.patiently(steps.loader()):
                totals = self._totals(inputs, steps)
                if totals.asked_to_stop:
                    self.save_and_stop(rng_state())
                if totals.newly_failed:
                    self._record_failures(inputs, steps)
                supervised += totals.supervised_tokens
                for batch in inputs:
                    with self.compute_loss_context_manager():
                        summed += self._summed_loss(model, batch)
        loss = self.accelerator.reduce(summed, "sum").item() / supervised
        counted = self.measured.counted
        counted.evaluated_at, counted.evaluation_due = self.state.global_step, False
        counted.evaluation_seconds += time.monotonic() - began
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _summed_loss(self, model: nn.Module, batch: DeviceInputs) -> torch.Tensor:
        """Cross-entropy summed over a device batch's supervised tokens, a scalar.

        A batch without any gives zero with a graph, so that every trainable tensor has a gradient.
        """
        inputs: dict[str, Any] = self._prepare_input(dict(batch.inputs))
        if "ends" in inputs:  # packed; the mask is made on the device
            inputs |= attention_inputs(inputs.pop("ends"), bare(self.model).config)
        labels = inputs.pop("labels")[:, 1:]  # [rows, tokens - 1]: position i predicts token i + 1
        learnt = labels != IGNORED
        asked = nn.functional.pad(learnt, (0, 1))  # [rows, tokens] boolean: where logits are computed
        if batch.supervised_tokens == 0:
            asked[0, 0] = True
        logits = model(
            **inputs, logits_to_keep=asked, use_cache=False
        ).logits.float()  # [supervised, vocabulary]
        if batch.supervised_tokens == 0:
            return logits.sum() * 0.0
        return nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`Trainer.create_optimizer`: what `args.optim` names (AdamW), with a learning rate for each part."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups = parameter_groups(model, self.stage.schedule, self.args.weight_decay, decayed)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def round_trained(self, dtype: torch.dtype) -> None:
        """Round what trains to another dtype, in place, and measure the held-out loss once more."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.data.to(dtype))
        if self.held_out_steps is not None:
            self.measured.unrounded_loss = self.measured.last_held_out_loss()
            self.evaluate()

    # What the processes tell one another.

    def _totals(self, inputs: list[DeviceInputs], steps: ExactSteps) -> StepTotals:
        """What this process has of a step, summed over the processes in one message."""
        return StepTotals(
            *self._sum(
                sum(batch.conversations for batch in inputs),
                sum(batch.supervised_tokens for batch in inputs),
                len(steps.ledger.newly_failed(inputs)),
                int(self.stop.received is not None),
            )
        )

    def _sum(self, *numbers: int) -> Sequence[int]:
        if self.accelerator.num_processes == 1:
            return numbers
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()

    def _record_failures(self, inputs: list[DeviceInputs], steps: ExactSteps) -> None:
        """Let every process know which rows failed in a step.

        Raises:
            TrainingError: more rows cannot be used by now than may be.
        """
        ledger = steps.ledger
        ledger.failed.update(gather_object(list(ledger.newly_failed(inputs).items())))
        if fault := ledger.fault():
            raise TrainingError(
                f"{fault} Of the {ledger.kind} data of stage {self.stage.name!r}, met while it trained: "
                f"{next(reversed(ledger.failed.values()))} Each row is listed in rejected.jsonl. Bring the "
                f"images back or fix them, or raise max_rejected. {self.checkpointing.how_to_resume()}"
            )

    def asked_to_stop(self) -> bool:
        """Whether any process got SIGTERM or Ctrl-C; all processes call it."""
        return self._sum(int(self.stop.received is not None))[0] > 0

    def save_and_stop(self, rng: dict[str, Any]) -> None:
        """Save the stage as it was after its last step, and stop. All processes call it.

        Args:
            rng: the random numbers at the end of that step.

        Raises:
            Interrupted: always.
        """
        step = self.state.global_step
        if self.checkpointing.has_news(step):
            self.checkpointing.save(step, self.model, self.optimizer, self.lr_scheduler, rng)
        number = self.stop.received or signal.SIGTERM  # another process's, which they all obey
        raise Interrupted(
            number,
            f"Stopped by {signal.Signals(number).name} after step {step} of {self.state.max_steps} of stage "
            f"{self.stage.name!r}. {self.checkpointing.how_to_resume()}",
        )

    # Resuming: the trainer's loop is told where to begin, and what it would load and save is ours.

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        """`Trainer._init_training_state`: the epoch to begin with, and the steps of it that are done."""
        beginning = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial
        )
        checkpoint = self.checkpointing.resumed
        if checkpoint is None:
            return beginning
        self.state.global_step = checkpoint.step
        self.state.epoch = checkpoint.step / num_update_steps_per_epoch
        if checkpoint.step >= max_steps:  # also in the middle of an epoch, which would be resumed otherwise
            return num_train_epochs, 0
        return divmod(checkpoint.step, num_update_steps_per_epoch)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> tuple[nn.Module, Any]:
        """`Trainer._prepare_for_training`: once the optimizer is there, it gets back its state."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.measured.begin(self.checkpointing.seconds_before())
        self.checkpointing.restore_optimizer(self.model, self.optimizer, self.lr_scheduler)
        return prepared

    def _run_epoch(self, **settings: Any) -> None:
        """`Trainer._run_epoch`: told that it resumes, it skips the steps of an epoch that are done (so no
        image is decoded for them), fetches the next step, and only then asks for the random numbers."""
        super()._run_epoch(**settings | {"resume_from_checkpoint": self.checkpointing.resumed})

    def _load_rng_state(self, checkpoint: Any) -> None:
        """`Trainer._load_rng_state`: from our checkpoint."""
        if checkpoint is not None:
            self.checkpointing.restore_random_numbers(self.args.seed)

    def _maybe_log_save_evaluate(self, *arguments: Any, **settings: Any) -> None:
        """`Trainer._maybe_log_save_evaluate`: logs, saves, and only then evaluates, so that a stage that is
        killed while it evaluates resumes with the evaluation."""
        save_due, evaluation_due = self.control.should_save, self.control.should_evaluate
        self.measured.counted.evaluation_due = evaluation_due
        self.control.should_save = self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*arguments, **settings)
        if save_due:
            self.checkpointing.save_on_schedule(
                self.state.global_step, self.state.save_steps, self.model, self.optimizer, self.lr_scheduler
            )
        if evaluation_due:
            self.evaluate()


def _as_is(batches: Any) -> Any:
    return batches

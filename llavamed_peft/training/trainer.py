"""TRL's `SFTTrainer` over exact optimizer steps of conversations: the one subclass behind every stage.

Four things are ours and everything else is the trainer's: the data loader (one item is one process's share of one optimizer
step, a list of device batches, so `gradient_accumulation_steps` is 1 and accelerate does not re-shard it), the step (the mean
over all of the step's supervised tokens, however they are cut), the held-out loss (the same mean), and the optimizer's groups
(two learning rates). Logits are computed at supervised positions only. That a killed stage goes on bit for bit is
`resumption.py`'s business.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from trl import SFTConfig

from ..batches.decoding import DeviceBatches, DeviceInputs
from ..batches.index import Index
from ..batches.signals import prepare_worker, signals_held
from ..batches.steps import StepSampler, steps_in_all
from ..batches.workers import WorkerNote, WorkerNotes, free_shared_memory, workers_with_room
from ..errors import TrainingError
from ..features.forecast import Asked, in_bytes, passes_in_an_epoch
from ..features.store import Features, Pictures
from ..modeling.parts import PROJECTOR, bare
from ..packing import PackedCollator
from ..packing.masks import attention_inputs
from ..stages import Schedule, Stage
from .checkpoints import rng_state, standing
from .filling import FeatureCache
from .resuming import ResumableTrainer

HANGS_AFTER = (
    600.0  # seconds that a worker may be at one image; a slow disk takes seconds, a dead one for ever
)


LOOKS_EVERY = 10.0  # seconds in which training that waits for data looks whether its workers get on


_AHEAD = {
    "train": 1,
    "eval": 1,
    "features": 2,
}  # items that a worker prepares ahead, by use: whole steps, or single images


_DIED, _TIMED_OUT = (
    "DataLoader worker (pid",
    "DataLoader timed out",
)  # how torch's errors begin; it has no class for them


# torch hands each tensor of a worker over as an open file: 8 workers may have 2,000 under way, and 1,024 is the usual limit.
OPEN_FILES = 65_536


Loaded = TypeVar("Loaded")


class StageTrainer(ResumableTrainer):
    """TRL's trainer over exact steps of conversations.

    Args:
        model: with the stage's trainable parameters.
        config: the trainer's settings.
        processor: the stage's.
        stage: its schedule's batch, order and learning rates.
        train_index, eval_index: the data.
        collator: lays a device batch out; its `max_row_tokens` bounds one.
        max_rejected: share of the rows that may be unusable.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SFTConfig,
        processor: ProcessorMixin,
        stage: Stage,
        train_index: Index,
        eval_index: Index | None,
        collator: PackedCollator,
        max_rejected: float,
    ):
        self.collator, self.max_rejected = collator, max_rejected
        self.tile_bytes = (
            collator.encoder.tile_bytes
        )  # of what a device batch holds of an image's tile: pixels, or features
        self.workers: dict[str, int] = {}  # of the data loaders of each use
        self.worker_notes: dict[str, WorkerNotes] = {}
        if config.dataloader_num_workers:
            allow_open_files()
        self.rates: dict[str, float] = {}  # of the step just taken, by part
        super().__init__(
            stage,
            train_index,
            eval_index,
            model=model,
            args=config,
            data_collator=_as_is,
            train_dataset=train_index.rows,
            eval_dataset=None if eval_index is None else eval_index.rows,
            processing_class=processor,
        )

    def get_train_dataloader(self) -> DataLoader[list[DeviceInputs]]:
        """This process's share of every step of an epoch; not prepared by accelerate, which would shard it again."""
        return self._steps(self.train_index, self.schedule, "train")

    def _sampler(self, index: Index, schedule: Schedule) -> StepSampler:
        return index.sampler(
            self.collator, schedule, self.args.seed, self.args.process_index, self.args.world_size
        )

    def _steps(self, index: Index, schedule: Schedule, use: str) -> DataLoader[list[DeviceInputs]]:
        share = max(1, min(schedule.global_batch, len(index)) / self.args.world_size)
        loading = self._loading(
            use, lambda: share * index.mean_tiles(self.collator.encoder) * self.tile_bytes
        )
        return StepLoader(
            DeviceBatches(index, self.collator, self.worker_notes.get(use)),
            batch_sampler=self._sampler(index, schedule),
            collate_fn=_as_is,
            **loading,
        )

    def _loading(self, use: str, item_bytes: Callable[[], float]) -> dict[str, Any]:
        """How a data loader decodes ahead: by the workers asked for, or as many as have room, decided once for each use."""
        if use not in self.workers:
            asked = self.args.dataloader_num_workers
            self.workers[use] = self._workers_with_room(use, item_bytes()) if asked else 0
            if self.workers[use]:
                self.worker_notes[use] = WorkerNotes(self.workers[use])
        workers = self.workers[use]
        return {
            "num_workers": workers,
            "prefetch_factor": _AHEAD[use] if workers else None,
            "worker_init_fn": functools.partial(prepare_worker, self.stop.trains),
            "timeout": LOOKS_EVERY if workers else 0,
            "generator": torch.Generator(),  # or each epoch and evaluation would draw a number from dropout's
        }

    def _workers_with_room(self, use: str, item_bytes: float) -> int:
        """As many of the workers asked for as shared memory has room for; says so where they are fewer."""
        asked, free = self.args.dataloader_num_workers, free_shared_memory()
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = workers_with_room(asked, _AHEAD[use] * item_bytes, free, processes)
        if workers < asked and self.run_log is not None and self.is_world_process_zero():
            item = {"train": "a step", "eval": "a held-out step", "features": "an image"}[use]
            what = "pixels" if use == "features" or self.collator.features is None else "features"
            shared = f" for {processes} processes" if processes > 1 else ""
            self.run_log.show(
                f"{self.stage.name:<10} {workers} worker{'' if workers == 1 else 's'} instead of {asked}: {item} has about "
                f"{in_bytes(item_bytes)} of {what}, and /dev/shm has {in_bytes(free)} free{shared}",
                True,
            )
        return workers

    def stored_features(self, asked: Asked, dtype: torch.dtype, folder: Path) -> Features | None:
        """The features of the stage's images, stored now if they are not; `None` where they are not to be.

        Args:
            asked: always, never, or where it pays.
            dtype: in which they are stored.
            folder: of the run's feature cache.
        """
        if asked is False:
            return None

        def load(pictures: Pictures) -> Iterator[torch.Tensor | None]:
            largest = max(image.tiles for image in pictures.images) * encoder.tile_bytes
            loading = self._loading("features", lambda: largest)
            pictures.notes = self.worker_notes.get("features")
            return self._patiently(DataLoader(pictures, batch_size=None, **loading), "features")

        encoder = self.collator.encoder
        cache = FeatureCache(self, encoder, dtype, folder, load)
        began = time.monotonic()
        features = cache.prepare(asked, self._tower_passes())
        self.features_seconds += time.monotonic() - began
        if features is not None:
            self.tile_bytes = cache.tile_bytes
        return features

    def _tower_passes(self) -> float:
        """Images that pass the vision tower in the whole stage without a cache."""
        sampler = self._sampler(self.train_index, self.schedule)
        passes = self.schedule.epochs * passes_in_an_epoch(sampler, self.train_index.image_counts())
        if self.eval_index is None:
            return passes
        steps = steps_in_all(len(sampler), self.schedule)
        every = self.args.eval_steps if self.args.eval_steps >= 1 else math.ceil(steps * self.args.eval_steps)
        evaluations = 1 + math.ceil(steps / every)
        return passes + evaluations * passes_in_an_epoch(
            self._sampler(self.eval_index, self._once()), self.eval_index.image_counts()
        )

    def _once(self) -> Schedule:
        """Of a held-out loss."""
        return Schedule(epochs=1, learning_rate=1, global_batch=self.schedule.global_batch)

    def _patiently(self, loader: Iterable[Loaded], use: str) -> Iterator[Loaded]:
        """What a data loader yields, waited for as long as its workers get on: a large step of slow images may take long.

        Raises:
            RuntimeError: of torch's, a worker died, or is at one image for longer than `HANGS_AFTER`.
            TrainingError: a worker's.
        """
        with signals_held():
            items = iter(loader)
        asked = time.monotonic()
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except TrainingError as error:  # around whose words torch puts the worker's traceback
                raise TrainingError(
                    str(error).rpartition(f"{TrainingError.__module__}.TrainingError: ")[2].strip()
                ) from error
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
                if time.monotonic() - asked > HANGS_AFTER and not self.worker_notes[use].get_on(HANGS_AFTER):
                    raise
            else:
                yield item
                asked = time.monotonic()

    @contextlib.contextmanager
    def naming_rows(self) -> Iterator[None]:
        """Where a worker dies or hangs, an error that names the row it was at.

        A worker's death is raised in whatever the training process does at that moment, not only where it asks for data.
        """
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError) as error:
            # What a dying worker had sent cannot be fetched, some moments before torch learns of its end: that comes now.
            patience = time.monotonic() + (1 if isinstance(error, RuntimeError) else 10)
            while (
                self.worker_notes
                and not any(note.is_dead for note in self._notes())
                and time.monotonic() < patience
            ):
                with contextlib.suppress(RuntimeError):
                    time.sleep(0.1)
            notes = self._notes()
            ends = [f"died at {note.text}" for note in notes if note.is_dead]
            ends += [
                f"has been at {note.text} for {note.seconds:.0f} s"
                for note in notes
                if note.seconds > HANGS_AFTER
            ]
            if not ends and not str(error).startswith((_DIED, _TIMED_OUT)):
                raise
            unknown = "hangs" if str(error).startswith(_TIMED_OUT) else "died"
            raise TrainingError(
                f"A worker that decodes images {'; another '.join(ends or [unknown])} ({str(error).strip()}). Look at the image "
                "in a process of its own, and leave the row out if it is the cause; if memory ran out, take fewer workers (now "
                f"{max(self.workers.values())}). {standing(self.checkpoint_folder)}"
            ) from error

    def _notes(self) -> list[WorkerNote]:
        return [note for notes in self.worker_notes.values() for note in notes.read()]

    def get_batch_samples(
        self, steps: Iterator[list[DeviceInputs]], *arguments: Any
    ) -> tuple[list[list[DeviceInputs]], Any]:
        """The next step's data; what it takes is time that the model waits."""
        began = time.monotonic()
        samples = super().get_batch_samples(self._patiently(steps, "train"), *arguments)
        self.waiting_seconds += time.monotonic() - began
        return samples

    def training_step(
        self, model: nn.Module, inputs: list[DeviceInputs], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One optimizer step's gradient: each device batch in turn, scaled by the step's supervised tokens over all processes."""
        model.train()
        before = rng_state()
        conversations, supervised = self._total(self.train_index, inputs)
        self.step_supervised_tokens = supervised
        self.rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        # DDP averages gradients over processes; the step's loss is a mean over tokens, wherever they are
        scale = self.accelerator.num_processes / max(supervised, 1)
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
                f"The loss of step {self.state.global_step + 1} is {total.item()}. {self.would_recur()}"
            )
        self.seen_conversations += conversations
        self.seen_supervised_tokens += supervised
        return total

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The held-out loss: the mean over all supervised tokens of the held-out data.

        Raises:
            Interrupted, TrainingError: as `_total`.
        """
        assert self.eval_index is not None
        began = time.monotonic()
        model = self.model_wrapped
        model.eval()
        summed = torch.zeros((), dtype=torch.float64, device=self.args.device)
        supervised = 0
        with torch.no_grad():
            for inputs in self._patiently(self._steps(self.eval_index, self._once(), "eval"), "eval"):
                supervised += self._total(self.eval_index, inputs)[1]
                for batch in inputs:
                    with self.compute_loss_context_manager():
                        summed += self._summed_loss(model, batch)
        loss = self.accelerator.reduce(summed, "sum").item() / supervised
        self.evaluated_at, self.evaluation_due = self.state.global_step, False
        self.evaluation_seconds += time.monotonic() - began
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what `args.optim` names) over the trainables, projector and language model in groups of their own rates."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(self.optimizer_groups(model), **settings)
        return self.optimizer

    def optimizer_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, each with its name, learning rate and weight decay; norms and biases are not decayed."""
        decayed = set(self.get_decay_parameter_names(model))
        rates = {"language_model": self.schedule.learning_rate}
        rates["projector"] = self.schedule.projector_learning_rate or self.schedule.learning_rate
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = "projector" if PROJECTOR in name else "language_model"
                decay = self.args.weight_decay if name in decayed else 0.0
                group = groups.setdefault(
                    (part, decay), {"name": part, "lr": rates[part], "weight_decay": decay, "params": []}
                )
                group["params"].append(parameter)
        return list(groups.values())

    def _summed_loss(self, model: nn.Module, batch: DeviceInputs) -> torch.Tensor:
        """Cross-entropy summed over a device batch's supervised tokens; zero, with a graph, for a batch without any."""
        inputs: dict[str, Any] = self._prepare_input(dict(batch.inputs))
        if "ends" in inputs:
            inputs |= attention_inputs(inputs.pop("ends"), bare(self.model).config)
        labels = inputs.pop("labels")[:, 1:]
        learnt = labels != -100
        asked = nn.functional.pad(learnt, (0, 1))  # the position before a supervised token predicts it
        if batch.supervised_tokens == 0:
            asked[0, 0] = True
        logits = model(**inputs, logits_to_keep=asked, use_cache=False).logits.float()
        if batch.supervised_tokens == 0:
            return logits.sum() * 0.0
        return nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")

    def _total(self, index: Index, inputs: list[DeviceInputs]) -> tuple[int, int]:
        """Conversations and supervised tokens of a step, over all processes; here they also agree on stopping before it.

        Raises:
            Interrupted: one process was asked to stop.
            TrainingError: more rows are unusable by now than may be.
        """
        failed = {row: why for batch in inputs for row, why in batch.failed if row not in index.failed}
        local = [
            sum(batch.conversations for batch in inputs),
            sum(batch.supervised_tokens for batch in inputs),
            len(failed),
        ]
        conversations, supervised, newly_failed = self.agree_on_stopping(*local)
        if newly_failed:
            index.failed.update(gather_object(list(failed.items())))
            if fault := index.fault(self.max_rejected):
                assert self.checkpoint_folder is not None
                kind = "training" if index is self.train_index else "held-out"
                raise TrainingError(
                    f"{fault} Of the {kind} data of stage {self.stage.name!r}, met while it trained: "
                    f"{next(reversed(index.failed.values()))} Each row is listed in rejected.jsonl. Bring the images back or "
                    f"mend them, or raise max_rejected. {standing(self.checkpoint_folder)}"
                )
        return conversations, supervised


def allow_open_files() -> None:
    """Raise this process's own limit of open files as far as it may itself, up to `OPEN_FILES`."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if least != resource.RLIM_INFINITY and least < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class StepLoader(DataLoader[list[DeviceInputs]]):
    """A data loader whose sampler knows epochs; the trainer tells it through `set_epoch`, which torch's own does not have."""

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.batch_sampler.set_epoch(epoch)


def _as_is(batches: Any) -> Any:
    return batches

"""One stage's training: `train_stage`, on a small subclass of TRL's `SFTTrainer`.

Four things are ours and everything else is the trainer's: the data loader (one item is one process's share of one optimizer
step, a list of device batches, so `gradient_accumulation_steps` is 1 and accelerate does not re-shard it), the step (the mean
over all of the step's supervised tokens, however they are cut), the held-out loss (the same mean), and the optimizer's groups
(two learning rates). Logits are computed at supervised positions only. What is trained is `modeling/parts.py`'s business, what
the stage leaves `adapters.py`'s, and that a killed stage goes on bit for bit `resumption.py`'s.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from .checkpoints import Checkpoint, rng_state, standing
from .errors import TrainingError
from .feature_cache import Asked, FeatureCache, passes_in_an_epoch
from .interruption import prepare_worker
from .modeling.parts import (
    PROJECTOR,
    Tensors,
    always_look,
    bare,
    freeze_tower,
    load_tensors,
    set_dtypes,
    sharding_units,
    trainable_tensors,
)
from .modeling.sharding import Sharding, set_masters, shard, unrounded
from .packing import PackedCollator
from .packing.features import Features, Pictures
from .packing.index import DeviceBatches, DeviceInputs, Index
from .packing.masks import attention_mask, choose_attention, fill_tokens
from .packing.steps import StepSampler, learns_nothing, steps_in_all
from .packing.workers import WorkerNotes
from .report import RunLog
from .resumption import ResumableTrainer
from .stages import Schedule, Stage

_EVALUATIONS_PER_STAGE = 10
_CHECKPOINTS_PER_STAGE = 10
HANGS_AFTER = 600.0  # seconds that training waits for its workers' next step; a slow disk takes seconds, a dead one for ever
# Each tensor on its way from a worker is one: 8 workers may have 2,000 under way, where 1,024 is the usual limit
OPEN_FILES = 65_536
MAX_GRAD_NORM = 1.0  # the Hugging Face trainer's default, with which LLaVA and LLaVA-Med were trained


@dataclass(frozen=True, slots=True)
class Computing:
    """How a stage is computed; none of it changes what is learnt beyond rounding.

    Args:
        dtype: of the frozen weights and of autocast; trainable tensors are fp32.
        layout: of a device batch, see `PackedCollator`.
        max_row_tokens: bound of a device batch: packed, the tokens of its row; padded, rows × longest.
        gradient_checkpointing: recompute activations in the backward pass.
        workers: processes that decode images ahead; 0 decodes in the training process.
        eval_steps: optimizer steps between two held-out losses; `None`: a tenth of the stage's.
        save_steps: optimizer steps between two checkpoints; `None`: a tenth of the stage's.
        report_to: `"none"`, or trackers that the trainer knows, such as `"tensorboard"` or `"trackio"`.
        sharding: how the model is spread over processes; `None`: each has a whole one.
        feature_cache: store what the frozen vision tower makes of each image: always, never, or where it pays; never of a
            sharded model.
    """

    dtype: torch.dtype
    layout: str
    max_row_tokens: int
    gradient_checkpointing: bool
    workers: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    report_to: str | list[str] = "none"
    sharding: Sharding | None = None
    feature_cache: Asked = "auto"


@dataclass(slots=True)
class Trained:
    """What training a stage yields.

    Args:
        tensors: what the stage leaves, by name.
        metrics: losses, counts, seconds, for `stage.json`.
    """

    tensors: Tensors
    metrics: dict[str, Any]


def train_stage(
    model: nn.Module,
    processor: ProcessorMixin,
    stage: Stage,
    train_index: Index,
    eval_index: Index | None,
    computing: Computing,
    seed: int,
    work_folder: Path,
    checkpoint_folder: Path,
    feature_folder: Path,
    checkpoint: Checkpoint | None,
    run_log: RunLog,
) -> Trained:
    """Train what requires grad in the model over the stage's schedule.

    Args:
        model: from `parts.attach` or `parts.unfreeze_full`, its trainable tensors holding what the stage starts from.
        processor: the stage's.
        train_index, eval_index: what to learn, and what to measure the held-out loss on before, every `eval_steps` and after.
        work_folder: where the trainer may write.
        checkpoint_folder: where it saves itself.
        feature_folder: of the run's feature cache.
        checkpoint: of the same stage, to go on from; `None`: begin.
        run_log: takes each record of the training as it comes.

    Raises:
        TrainingError: the loss or a trained tensor is not finite, a worker died or hangs (the error names its row), a checkpoint
            or a file of features cannot be written.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved, or before the first step the features so far.
    """
    schedule = stage.schedule
    on_gpu = torch.cuda.is_available()
    sharding = computing.sharding
    by_us = sharding is not None and sharding.deepspeed is None
    config = (_LeftWhereItIs if by_us else SFTConfig)(
        output_dir=str(work_folder),
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_ratio,
        weight_decay=schedule.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        seed=seed,
        data_seed=seed,
        gradient_accumulation_steps=1,
        max_length=None,
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        bf16=computing.dtype == torch.bfloat16,
        activation_checkpointing=computing.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_num_workers=computing.workers,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=computing.save_steps or 1 / _CHECKPOINTS_PER_STAGE,
        eval_strategy="no" if eval_index is None else "steps",
        eval_steps=computing.eval_steps or 1 / _EVALUATIONS_PER_STAGE,
        report_to=computing.report_to,
        run_name=stage.name,
        deepspeed=None if sharding is None else sharding.deepspeed,
    )
    quantized = getattr(bare(model), "is_loaded_in_4bit", False)
    start = trainable_tensors(model) if quantized else None
    fills = fill_tokens(torch.device("cuda" if on_gpu else "cpu"))
    collator = PackedCollator(processor, schedule.max_length, computing.max_row_tokens, computing.layout, fills)
    trainer = StageTrainer(model, config, processor, stage, train_index, eval_index, collator)
    unset_hf_deepspeed_config()  # or the next stage's model would be loaded in pieces
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(trainer, run_log))
    trainer.begin_from(checkpoint_folder, checkpoint, run_log)
    if start is not None:
        # The trainer rounds a quantised model's trainables to bf16 while it is built; what the stage starts from is put back.
        set_dtypes(model, computing.dtype)
        load_tensors(model, start)
        del start
    freeze_tower(model)
    always_look(model)
    if computing.layout == "packed":
        choose_attention(bare(model), trainer.args.device)
    if checkpoint is not None:
        load_tensors(model, checkpoint.tensors())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    carried: Tensors = {}
    if by_us:
        shard(model, sharding_units(model), sharding, computing.dtype)
        # the trainer's word for a model that places itself and reduces its own gradients
        trainer.is_distributed_loading_by_transformers = True
    elif sharding is not None:
        trainer.add_callback(_Masters(unrounded(model, computing.dtype)))
        if stage.trains == "projector":  # what it carries frozen, DeepSpeed would hand on rounded
            carried = {name: tensor for name, tensor in trainable_tensors(model).items() if ".lora_" in name}
    steps_per_epoch = len(trainer.get_train_dataloader())
    if learns_nothing(steps_per_epoch, schedule):
        steps = steps_per_epoch * schedule.epochs
        warnings.warn(
            f"Stage {stage.name!r} has {steps:g} optimizer step, which warm-up takes at rate 0: nothing will be learnt. Give it "
            "more data or epochs, a smaller global_batch, or warmup_ratio=0.",
            stacklevel=2,
        )
    with trainer.naming_rows(), trainer.stop:
        trainer.collator.features = trainer.stored_features(computing, feature_folder)
        trainer.train()
        if eval_index is not None and trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        trainer.agree_on_stopping()
    for index in (train_index, eval_index):
        if index is not None:
            index.failed.update(gather_object(list(index.failed.items())))
    if trainer.seen_conversations == 0:
        why = next(iter(train_index.failed.values()), "")
        raise TrainingError(f"Not one conversation of stage {stage.name!r} could be decoded; nothing was written. {why}")
    tensors = trainable_tensors(model) | carried
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise TrainingError(
            f"After the last step {len(broken)} of {len(tensors)} tensors are not finite ({broken[0]}). Lower learning_rate; "
            "nothing of this stage was written, the stages before it are untouched."
        )
    trained = Trained(tensors, summary(trainer, trainable))
    del trainer  # it and its callbacks hold one another, the model and the optimizer; the next stage loads its own
    gc.collect()
    return trained


class StageTrainer(ResumableTrainer):
    """TRL's trainer over exact steps of conversations.

    Args:
        model: with the stage's trainable parameters.
        config: the trainer's settings.
        processor: the stage's.
        stage: its schedule's batch, order and learning rates.
        train_index, eval_index: the data.
        collator: lays a device batch out; its `max_row_tokens` bounds one.
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
    ):
        self.collator = collator
        workers = config.dataloader_num_workers
        self.worker_notes = {use: WorkerNotes(workers) for use in ("train", "eval", "features")} if workers else {}
        if workers:
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
        return StepSampler(
            index.column("length"),
            index.column("group"),
            schedule,
            self.collator.max_row_tokens,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
            prefixes=index.prefixes() if self.collator.layout == "packed" else None,
            fill_tokens=self.collator.fill_tokens,
        )

    def _steps(self, index: Index, schedule: Schedule, use: str) -> DataLoader[list[DeviceInputs]]:
        return StepLoader(
            DeviceBatches(index, self.collator, self.worker_notes.get(use)),
            batch_sampler=self._sampler(index, schedule),
            collate_fn=_as_is,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        """How data loaders decode ahead."""
        return {
            "num_workers": self.args.dataloader_num_workers,
            "worker_init_fn": functools.partial(prepare_worker, self.stop.trains),
            "timeout": HANGS_AFTER if self.args.dataloader_num_workers else 0,
            "generator": torch.Generator(),  # or each epoch and evaluation would draw a number from dropout's
        }

    def stored_features(self, computing: Computing, folder: Path) -> Features | None:
        """The features of the stage's images, stored now if they are not; `None` where they are not to be."""
        if computing.feature_cache is False or computing.sharding is not None:
            return None

        def load(pictures: Pictures) -> DataLoader[torch.Tensor | None]:
            return DataLoader(pictures, batch_size=None, **self._loading())

        cache = FeatureCache(self, self.collator.encoder, computing.dtype, folder, load, self.worker_notes.get("features"))
        began = time.monotonic()
        features = cache.prepare(computing.feature_cache, self._tower_passes(computing))
        self.features_seconds += time.monotonic() - began
        return features

    def _tower_passes(self, computing: Computing) -> float:
        """Images that pass the vision tower in the whole stage without a cache."""
        sampler = self._sampler(self.train_index, self.schedule)
        passes = self.schedule.epochs * passes_in_an_epoch(sampler, self.train_index.image_counts())
        if self.eval_index is None:
            return passes
        steps = steps_in_all(len(sampler), self.schedule)
        evaluations = 1 + math.ceil(steps / (computing.eval_steps or math.ceil(steps / _EVALUATIONS_PER_STAGE)))
        return passes + evaluations * passes_in_an_epoch(
            self._sampler(self.eval_index, self._once()), self.eval_index.image_counts()
        )

    def _once(self) -> Schedule:
        """Of a held-out loss."""
        return Schedule(epochs=1, learning_rate=1, global_batch=self.schedule.global_batch)

    @contextlib.contextmanager
    def naming_rows(self) -> Iterator[None]:
        """Where a worker dies or hangs, an error that names the row it was at.

        A worker's death is raised in whatever the training process does at that moment, not only where it asks for data.
        """
        try:
            yield
        except (RuntimeError, ConnectionError, EOFError) as error:
            if self.worker_notes:
                # What a dying worker had sent cannot be fetched, a moment before torch learns of its end: that comes now.
                with contextlib.suppress(RuntimeError):
                    time.sleep(1)
            notes = [note for notes in self.worker_notes.values() for note in notes.read()]
            ends = [f"died at {note.text}" for note in notes if note.is_dead]
            ends += [f"has been at {note.text} for {note.seconds:.0f} s" for note in notes if note.seconds > HANGS_AFTER / 2]
            if not ends and not str(error).startswith("DataLoader worker (pid"):  # torch has no class for it
                raise
            raise TrainingError(
                f"A worker that decodes images {'; another '.join(ends or ['died'])} ({str(error).strip()}). Look at the image "
                "in a process of its own, and leave the row out if it is the cause; if memory ran out, take fewer workers (now "
                f"{self.args.dataloader_num_workers}). {standing(self.checkpoint_folder)}"
            ) from error

    def get_batch_samples(self, *arguments: Any) -> tuple[list[list[DeviceInputs]], Any]:
        """The next step's data; what it takes is time that the model waits."""
        began = time.monotonic()
        samples = super().get_batch_samples(*arguments)
        self.waiting_seconds += time.monotonic() - began
        return samples

    def training_step(self, model: nn.Module, inputs: list[DeviceInputs], num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step's gradient: each device batch in turn, scaled by the step's supervised tokens over all processes."""
        model.train()
        before = rng_state()
        self._note_failures(self.train_index, inputs)
        conversations, supervised = self._total(inputs)
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
            raise TrainingError(f"The loss of step {self.state.global_step + 1} is {total.item()}. {self.would_recur()}")
        self.seen_conversations += conversations
        self.seen_supervised_tokens += supervised
        return total

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The held-out loss: the mean over all supervised tokens of the held-out data."""
        assert self.eval_index is not None
        began = time.monotonic()
        model = self.model_wrapped
        model.eval()
        summed = torch.zeros((), dtype=torch.float64, device=self.args.device)
        supervised = 0
        with torch.no_grad():
            for inputs in self._steps(self.eval_index, self._once(), "eval"):
                self._note_failures(self.eval_index, inputs)
                supervised += self._total(inputs)[1]
                for batch in inputs:
                    with self.compute_loss_context_manager():
                        summed += self._summed_loss(model, batch)
        if supervised == 0:
            raise TrainingError(f"No held-out conversation of stage {self.stage.name!r} could be decoded; wanted its images.")
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
                group = groups.setdefault((part, decay), {"name": part, "lr": rates[part], "weight_decay": decay, "params": []})
                group["params"].append(parameter)
        return list(groups.values())

    def _summed_loss(self, model: nn.Module, batch: DeviceInputs) -> torch.Tensor:
        """Cross-entropy summed over a device batch's supervised tokens; zero, with a graph, for a batch without any."""
        inputs: dict[str, torch.Tensor] = self._prepare_input(dict(batch.inputs))
        if "ends" in inputs:
            inputs["attention_mask"] = attention_mask(inputs.pop("ends"), bare(self.model).config)
        labels = inputs.pop("labels")[:, 1:]
        learnt = labels != -100
        asked = nn.functional.pad(learnt, (0, 1))  # the position before a supervised token predicts it
        if batch.supervised_tokens == 0:
            asked[0, 0] = True
        logits = model(**inputs, logits_to_keep=asked, use_cache=False).logits.float()
        if batch.supervised_tokens == 0:
            return logits.sum() * 0.0
        return nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")

    def _total(self, inputs: list[DeviceInputs]) -> tuple[int, int]:
        """Conversations and supervised tokens of a step, over all processes; here they also agree on stopping before it."""
        local = [sum(batch.conversations for batch in inputs), sum(batch.supervised_tokens for batch in inputs)]
        conversations, supervised = self.agree_on_stopping(*local)
        return conversations, supervised

    def _note_failures(self, index: Index, inputs: list[DeviceInputs]) -> None:
        for batch in inputs:
            index.failed.update(batch.failed)


class _LeftWhereItIs(SFTConfig):
    """Of a model that is sharded later: whole, it may not fit on a GPU."""

    place_model_on_device = False


def allow_open_files() -> None:
    """Raise this process's own limit of open files as far as it may itself, up to `OPEN_FILES`."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if least != resource.RLIM_INFINITY and least < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class StepLoader(DataLoader[list[DeviceInputs]]):
    """A data loader whose sampler knows epochs; the trainer tells it through `set_epoch`, which torch's own does not have."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.batch_sampler.set_epoch(epoch)


class _Watch(TrainerCallback):
    """Turns the trainer's logs into records: losses, rates, conversations and tokens per second, time left."""

    def __init__(self, trainer: StageTrainer, run_log: RunLog):
        self.trainer = trainer
        self.run_log = run_log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        record: dict[str, Any] = {"stage": self.trainer.stage.name, "step": state.global_step, "steps": state.max_steps}
        if "eval_loss" in logs:
            record["eval_loss"] = logs["eval_loss"]
        elif "loss" in logs:
            seconds = self.trainer.training_seconds()
            record["epoch"] = round(state.epoch, 4)
            record["loss"] = logs["loss"]
            record["grad_norm"] = logs.get("grad_norm")
            record |= {f"{part}_learning_rate": rate for part, rate in self.trainer.rates.items()}
            record["conversations_per_second"] = round(self.trainer.seen_conversations / seconds, 3)
            record["supervised_tokens_per_second"] = round(self.trainer.seen_supervised_tokens / seconds, 3)
            record["waiting_share"] = round(self.trainer.waiting_seconds / seconds, 4)
            record["seconds"] = round(seconds, 3)
            record["seconds_left"] = round(seconds / state.global_step * (state.max_steps - state.global_step), 1)
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


class _Masters(TrainerCallback):
    """Gives DeepSpeed, once it has the model, the trainable tensors as they were before it rounded them."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        set_masters(model, self.tensors)
        self.tensors = {}


def _as_is(batches: Any) -> Any:
    return batches

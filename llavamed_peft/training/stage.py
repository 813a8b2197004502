"""One stage's training, step by step: `train_stage`.

What trains is decided in `modeling/scopes.py`; how a step is computed is in `trainer.py`; what the stage
leaves is written by `adapters/`.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from ..batches.ledger import Ledger
from ..batches.loader import HELD_OUT, TRAINING, ExactSteps, Workers
from ..batches.signals import StopSignals
from ..batches.steps import why_nothing_is_learnt
from ..errors import TrainingError
from ..features.filling import FeatureCache, shown_images
from ..features.forecast import tower_passes
from ..features.store import Features
from ..modeling.parts import bare, is_lora, sharding_units
from ..modeling.sharding import set_masters, shard, unrounded
from ..modeling.tensors import Tensors, load_tensors, set_dtypes, trainable_tensors
from ..modeling.tower import always_look, freeze_tower
from ..packing import PackedCollator
from ..packing.masks import RECOMPILE_LIMIT, choose_attention, fill_tokens
from ..reporting.run_log import RunLog
from ..stages import Schedule, Stage
from .checkpointing import Checkpointing, not_finite
from .checkpoints import Checkpoint, rng_state
from .computing import MAX_GRAD_NORM, Computing
from .gpu_memory import enough_to_store_features, enough_to_train
from .metrics import Measured, Watch
from .trainer import StageTrainer

# Checkpoints, and held-out losses, where the call does not say how many steps are between two
_PER_STAGE = 10


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a stage that trains may write.

    Args:
        logs: the trackers' files.
        checkpoints: the stage's own.
        features: the run's feature cache.
    """

    logs: Path
    checkpoints: Path
    features: Path


@dataclass(frozen=True, slots=True)
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
    train: Ledger,
    held_out: Ledger | None,
    *,
    computing: Computing,
    seed: int,
    folders: Folders,
    checkpoint: Checkpoint | None,
    run_log: RunLog,
    begins_with: Mapping[str, str | None],
    rounds_to: torch.dtype | None = None,
) -> Trained:
    """Train what requires grad in the model over the stage's schedule.

    Args:
        model: from `scopes.attach` or `scopes.unfreeze_full`, its trainable tensors holding what the stage
            starts from.
        processor: the stage's.
        train, held_out: what to learn, and what to measure the held-out loss on before, every `eval_steps`
            and after. They get the rows that fail.
        computing: how a step is computed.
        seed: of the order of the data and of dropout.
        folders: where to write.
        checkpoint: of the same stage, to resume from; `None`: begin.
        run_log: takes each record of the training as it comes.
        begins_with: the content hashes of base and parent, for the checkpoints.
        rounds_to: what is trained is rounded to it at the end, before the last held-out loss; `None`: it is
            left as it is.

    Raises:
        TrainingError: the loss or a trained tensor is not finite, too many images cannot be decoded, a worker
            died or hangs (the error names its row), the GPU's memory does not suffice, or a checkpoint or a
            file of features cannot be written.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved, or before the first step the features so
            far.
    """
    collator = stage_collator(model, processor, stage, computing)
    trainer = make_trainer(
        model,
        processor,
        stage,
        collator,
        train,
        held_out,
        computing=computing,
        seed=seed,
        folders=folders,
        checkpoint=checkpoint,
        run_log=run_log,
        begins_with=begins_with,
    )
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    carried = spread_model(trainer, computing)
    _warn_if_nothing_is_learnt(trainer)
    workers, how_to_resume = trainer.train_steps.workers, trainer.checkpointing.how_to_resume
    # Autograd's threads, which this does not reach, compile nothing: what they compute again was compiled
    # here.
    compiling = torch.compiler.config.patch(recompile_limit=RECOMPILE_LIMIT)
    with workers.naming_rows(how_to_resume), trainer.stop, compiling:
        with enough_to_store_features(stage, how_to_resume):
            collator.features = stored_features(trainer, computing, folders.features, run_log)
        with enough_to_train(trainer, computing.max_row_tokens, computing.gradient_checkpointing):
            trainer.train()
            if held_out is not None and trainer.measured.counted.evaluated_at != trainer.state.global_step:
                trainer.evaluate()
            if rounds_to is not None and not trainer.asked_to_stop():
                trainer.round_trained(rounds_to)
        if trainer.asked_to_stop():
            trainer.save_and_stop(rng_state())
    if trainer.is_world_process_zero():
        _show_failures(stage, train, held_out, run_log)
    tensors = _learnt_tensors(trainer) | carried
    cached_images = 0 if collator.features is None else len(collator.features)
    metrics = trainer.measured.summary(trainer.state.global_step, trainable, cached_images)
    # The trainer and its callbacks hold one another, the model and the optimizer; the next stage loads its
    # own.
    del trainer
    gc.collect()
    return Trained(tensors, metrics)


def stage_collator(
    model: nn.Module, processor: ProcessorMixin, stage: Stage, computing: Computing
) -> PackedCollator:
    """The collator of a stage's device batches; packed, the model's attention is chosen for it."""
    fills = None
    if computing.layout == "packed":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fills = fill_tokens(choose_attention(bare(model), device, computing.dtype))
    return PackedCollator(
        processor, stage.schedule.max_length, computing.max_row_tokens, computing.layout, fills
    )


def make_trainer(
    model: nn.Module,
    processor: ProcessorMixin,
    stage: Stage,
    collator: PackedCollator,
    train: Ledger,
    held_out: Ledger | None,
    *,
    computing: Computing,
    seed: int,
    folders: Folders,
    checkpoint: Checkpoint | None,
    run_log: RunLog,
    begins_with: Mapping[str, str | None],
) -> StageTrainer:
    """A stage's trainer, its model on the device and holding what training begins from."""
    processes, stop, measured = PartialState(), StopSignals(), Measured()

    def show(line: str) -> None:
        if processes.is_main_process:
            run_log.say(stage.name, line)

    workers = Workers(computing.workers, stop, show)
    once = Schedule(epochs=1, learning_rate=1, global_batch=stage.schedule.global_batch)
    of_process = (seed, processes.process_index, processes.num_processes, workers)
    train_steps = ExactSteps(train, collator, stage.schedule, *of_process, TRAINING)
    held_out_steps = None if held_out is None else ExactSteps(held_out, collator, once, *of_process, HELD_OUT)
    deepspeed = computing.sharding is not None and computing.sharding.deepspeed is not None
    checkpointing = Checkpointing(
        folders.checkpoints,
        checkpoint,
        enabled=not deepspeed,
        stage=stage,
        train=train,
        held_out=held_out,
        measured=measured,
        run_log=run_log,
        begins_with=begins_with,
    )
    config = trainer_config(stage, computing, seed, folders.logs, evaluates=held_out is not None)
    quantized = getattr(bare(model), "is_loaded_in_4bit", False)
    start = trainable_tensors(model) if quantized else None
    trainer = StageTrainer(
        model, config, processor, stage, train_steps, held_out_steps, checkpointing, measured, stop
    )
    unset_hf_deepspeed_config()  # or the next stage's model would be loaded in pieces
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(stage.name, measured, run_log))
    if deepspeed:
        show("DeepSpeed: saved when it is finished; stopped before, it begins again (FSDP2 saves)")
    if start is not None:
        # TRL rounds a quantised model's trainables to bf16 while the trainer is built: put them back.
        set_dtypes(model, computing.dtype)
        load_tensors(model, start)
    freeze_tower(model)
    always_look(model)
    if checkpoint is not None:
        load_tensors(model, checkpoint.tensors())
    return trainer


def trainer_config(stage: Stage, computing: Computing, seed: int, folder: Path, evaluates: bool) -> SFTConfig:
    """The settings of a stage's trainer."""
    schedule, sharding = stage.schedule, computing.sharding
    shards_here = sharding is not None and sharding.deepspeed is None
    return (_LeftWhereItIs if shards_here else SFTConfig)(
        output_dir=str(folder),
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_ratio,
        weight_decay=schedule.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        seed=seed,
        data_seed=seed,
        gradient_accumulation_steps=1,  # an item of the loader is a step
        max_length=None,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=computing.dtype == torch.bfloat16,
        activation_checkpointing=computing.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        dataloader_num_workers=computing.workers,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=computing.save_steps or 1 / _PER_STAGE,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=computing.eval_steps or 1 / _PER_STAGE,
        report_to=computing.report_to,
        run_name=stage.name,
        deepspeed=None if sharding is None else sharding.deepspeed,
    )


def spread_model(trainer: StageTrainer, computing: Computing) -> Tensors:
    """Spread the model over the processes, where the launch configuration asks for it.

    Returns:
        Tensors that the stage carries and DeepSpeed would hand back rounded: a projector stage's frozen LoRA.
    """
    model, sharding = trainer.model, computing.sharding
    if sharding is None:
        return {}
    if sharding.deepspeed is None:
        shard(model, sharding_units(model), sharding, computing.dtype)
        # how the trainer is told of a model that places itself and reduces its own gradients
        trainer.is_distributed_loading_by_transformers = True
        return {}
    trainer.add_callback(_Masters(unrounded(model, computing.dtype)))
    if trainer.stage.trains != "projector":
        return {}
    return {name: tensor for name, tensor in trainable_tensors(model).items() if is_lora(name)}


def stored_features(
    trainer: StageTrainer, computing: Computing, folder: Path, run_log: RunLog
) -> Features | None:
    """The features of the stage's images, stored now if they are not; `None` where no cache is used.

    Args:
        folder: of the run's feature cache.
    """
    if computing.feature_cache is False or computing.sharding is not None:
        return None
    began = time.monotonic()
    train, held_out = trainer.train_steps, trainer.held_out_steps
    indexes = [steps.index for steps in (train, held_out) if steps is not None]
    cache = FeatureCache(
        trainer.model,
        train.collator.encoder,
        computing.dtype,
        folder,
        stage=trainer.stage.name,
        workers=train.workers,
        run_log=run_log,
        how_to_resume=trainer.checkpointing.how_to_resume,
    )
    features = cache.prepare(
        shown_images(indexes, train.collator.encoder),
        computing.feature_cache,
        tower_passes(train, held_out, trainer.args.eval_steps),
    )
    trainer.measured.counted.features_seconds += time.monotonic() - began
    return features


def _warn_if_nothing_is_learnt(trainer: StageTrainer) -> None:
    steps = trainer.train_steps
    images = steps.index.image_counts().sum()
    if why := why_nothing_is_learnt(trainer.stage, len(steps.sampler()), images):
        warnings.warn(f"Stage {trainer.stage.name!r} will learn nothing: {why}", stacklevel=3)


def _show_failures(stage: Stage, train: Ledger, held_out: Ledger | None, run_log: RunLog) -> None:
    for ledger in (train, held_out):
        if ledger is not None and ledger.failed:
            run_log.say(
                stage.name,
                f"{len(ledger.failed):,} of {len(ledger.index):,} {ledger.kind} "
                "conversations could not be decoded and were left out, such as: "
                f"{next(iter(ledger.failed.values()))}",
            )


def _learnt_tensors(trainer: StageTrainer) -> Tensors:
    """What the stage leaves, by name.

    Raises:
        TrainingError: nothing was learnt from, or a tensor is not finite.
    """
    stage = trainer.stage
    if trainer.measured.counted.seen_conversations == 0:
        why = next(iter(trainer.train_steps.ledger.failed.values()), "")
        raise TrainingError(
            f"Not one conversation of stage {stage.name!r} could be decoded; nothing was written. {why}"
        )
    tensors = trainable_tensors(trainer.model)
    if broken := not_finite(tensors):
        raise TrainingError(
            f"After the last step {len(broken)} of {len(tensors)} tensors are not finite ({broken[0]}). "
            "Lower learning_rate; nothing of this stage was written, the stages before it are untouched."
        )
    return tensors


class _LeftWhereItIs(SFTConfig):
    """For a model that is sharded later: unsharded it may not fit on a GPU."""

    place_model_on_device = False


class _Masters(TrainerCallback):
    """Gives DeepSpeed, once it has the model, the trainable tensors as they were before it rounded them."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """`transformers.TrainerCallback.on_train_begin`."""
        set_masters(model, self.tensors)
        self.tensors = {}

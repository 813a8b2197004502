"""One stage's training: `train_stage` sets a `StageTrainer` up, runs it, and hands on what it learnt and measured.

What trains is `modeling/parts.py`'s business, how a step is computed `trainer.py`'s, what the stage leaves `adapters.py`'s.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig

from ..batches.index import Index
from ..batches.steps import why_nothing_is_learnt
from ..errors import TrainingError
from ..modeling.parts import bare, is_lora, sharding_units
from ..modeling.sharding import set_masters, shard, unrounded
from ..modeling.tensors import Tensors, load_tensors, set_dtypes, trainable_tensors
from ..modeling.tower import always_look, freeze_tower
from ..packing import PackedCollator
from ..packing.masks import RECOMPILE_LIMIT, choose_attention, fill_tokens
from ..reporting.run_log import RunLog
from ..stages import Stage
from .checkpoints import Checkpoint
from .computing import MAX_GRAD_NORM, Computing
from .gpu_memory import enough_to_store_features, enough_to_train
from .metrics import Watch, summary
from .trainer import StageTrainer

_EVALUATIONS_PER_STAGE = 10


_CHECKPOINTS_PER_STAGE = 10


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
    *,
    computing: Computing,
    seed: int,
    max_rejected: float,
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
        max_rejected: share of the rows, rejected ones and those whose images cannot be decoded, above which training ends.
        work_folder: where the trainer may write.
        checkpoint_folder: where it saves itself.
        feature_folder: of the run's feature cache.
        checkpoint: of the same stage, to go on from; `None`: begin.
        run_log: takes each record of the training as it comes.

    Raises:
        TrainingError: the loss or a trained tensor is not finite, too many images cannot be decoded, a worker died or hangs (the
            error names its row), the GPU's memory does not suffice, a checkpoint or a file of features cannot be written.
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
    fills = None
    if computing.layout == "packed":
        device = torch.device("cuda" if on_gpu else "cpu")
        fills = fill_tokens(choose_attention(bare(model), device, computing.dtype))
    collator = PackedCollator(
        processor, schedule.max_length, computing.max_row_tokens, computing.layout, fills
    )
    trainer = StageTrainer(model, config, processor, stage, train_index, eval_index, collator, max_rejected)
    unset_hf_deepspeed_config()  # or the next stage's model would be loaded in pieces
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(trainer, run_log))
    trainer.begin_from(checkpoint_folder, checkpoint, run_log)
    if not trainer.saves and trainer.is_world_process_zero():
        run_log.show(
            f"{stage.name:<10} DeepSpeed: saved when it is finished; stopped before, it begins again (FSDP2 saves)",
            True,
        )
    if start is not None:
        # The trainer rounds a quantised model's trainables to bf16 while it is built; what the stage starts from is put back.
        set_dtypes(model, computing.dtype)
        load_tensors(model, start)
        del start
    freeze_tower(model)
    always_look(model)
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
            carried = {name: tensor for name, tensor in trainable_tensors(model).items() if is_lora(name)}
    if why := why_nothing_is_learnt(
        stage, len(train_index.sampler(collator, schedule, seed)), train_index.image_counts().sum()
    ):
        warnings.warn(f"Stage {stage.name!r} will learn nothing: {why}", stacklevel=2)
    # autograd's threads, which this does not reach, compile nothing: what they compute again was compiled here
    compiling = torch.compiler.config.patch(recompile_limit=RECOMPILE_LIMIT)
    with trainer.naming_rows(), trainer.stop, compiling:
        if sharding is None:
            with enough_to_store_features(trainer):
                trainer.collator.features = trainer.stored_features(
                    computing.feature_cache, computing.dtype, feature_folder
                )
        with enough_to_train(trainer, computing.max_row_tokens, computing.gradient_checkpointing):
            trainer.train()
            if eval_index is not None and trainer.evaluated_at != trainer.state.global_step:
                trainer.evaluate()
        trainer.agree_on_stopping()
    for index, kind in ((train_index, "training"), (eval_index, "held-out")):
        if index is not None and index.failed and trainer.is_world_process_zero():
            lost = f"{len(index.failed):,} of {len(index):,} {kind} conversations could not be decoded and were left out"
            run_log.show(f"{stage.name:<10} {lost}, such as: {next(iter(index.failed.values()))}", True)
    if trainer.seen_conversations == 0:
        why = next(iter(train_index.failed.values()), "")
        raise TrainingError(
            f"Not one conversation of stage {stage.name!r} could be decoded; nothing was written. {why}"
        )
    tensors = trainable_tensors(model) | carried
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise TrainingError(
            f"After the last step {len(broken)} of {len(tensors)} tensors are not finite ({broken[0]}). Lower learning_rate; "
            "nothing of this stage was written, the stages before it are untouched."
        )
    trained = Trained(tensors, summary(trainer, trainable))
    del (
        trainer
    )  # it and its callbacks hold one another, the model and the optimizer; the next stage loads its own
    gc.collect()
    return trained


class _LeftWhereItIs(SFTConfig):
    """Of a model that is sharded later: whole, it may not fit on a GPU."""

    place_model_on_device = False


class _Masters(TrainerCallback):
    """Gives DeepSpeed, once it has the model, the trainable tensors as they were before it rounded them."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        set_masters(model, self.tensors)
        self.tensors = {}

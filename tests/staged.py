"""A stage's trainer as `train_stage` has it before it trains, for tests that look into a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ProcessorMixin

from llavamed_peft import Conversation, Stage
from llavamed_peft.batches.checking import build_index
from llavamed_peft.batches.index import Index
from llavamed_peft.batches.ledger import Ledger
from llavamed_peft.datasets.rejects import RejectLog
from llavamed_peft.datasets.sources import open_sources
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.scopes import adapter_config, attach, unfreeze_full
from llavamed_peft.modeling.tensors import set_dtypes
from llavamed_peft.packing import PackedCollator
from llavamed_peft.reporting.run_log import RunLog
from llavamed_peft.training.computing import Computing
from llavamed_peft.training.stage import Folders, make_trainer
from llavamed_peft.training.trainer import StageTrainer


def prepared(
    base: Path, stage: Stage, quantization: str | None = None
) -> tuple[torch.nn.Module, ProcessorMixin]:
    """The base with what the stage trains."""
    model, processor = load_checkpoint(base, quantization)
    torch.manual_seed(0)
    if stage.trains == "full":
        return unfreeze_full(model), processor
    return attach(model, adapter_config(model, stage.lora), stage.trains), processor


def indexed(rows: Sequence[Conversation], collator: PackedCollator, folder: Path) -> Index:
    """The index of some conversations, all of which can be used."""
    folder.mkdir(parents=True, exist_ok=True)
    with RejectLog(folder / "rejected.jsonl") as rejects:
        return build_index(open_sources(rows, None, "data"), collator, folder / "index.arrow", rejects, 0.0)


def stage_trainer(
    base: Path,
    rows: Sequence[Conversation],
    folder: Path,
    stage: Stage,
    *,
    layout: str = "packed",
    max_row_tokens: int = 4096,
    fill_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> StageTrainer:
    """The trainer of a stage over these rows, which writes into the folder."""
    model, processor = prepared(base, stage)
    set_dtypes(model, dtype)
    collator = PackedCollator(processor, 2048, max_row_tokens, layout, fill_tokens)
    train = Ledger(indexed(rows, collator, folder), "training", max_rejected=0.05)
    return make_trainer(
        model,
        processor,
        stage,
        collator,
        train,
        None,
        computing=Computing(dtype, layout, max_row_tokens, gradient_checkpointing=False, workers=workers),
        seed=42,
        folders=Folders(folder, folder / "checkpoints", folder / "features"),
        checkpoint=None,
        run_log=RunLog(folder),
        begins_with={"base": None, "parent": None},
    )

"""Writing a stage's folder, completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save
from transformers import ProcessorMixin

from ..modeling.generation import set_stops
from ..modeling.load import load_checkpoint
from ..modeling.processor import save_processor
from ..modeling.tensors import Tensors, load_tensors
from ..storage.hashing import file_sha256, weights_sha256
from .card import card_text
from .record import CARD, CONFIG, RECORD, WEIGHTS, Base, StageRecord
from .stage_adapter import StageAdapter, adapter_folder

# Makes a stage's record of what is known once its files are written: `kind`, `sha256`, `config_sha256`.
Unfinished = Callable[..., StageRecord]


def write_adapter(
    folder: Path,
    tensors: Tensors,
    config: LoraConfig,
    base: Base,
    base_class: type,
    processor: ProcessorMixin,
    unfinished: Unfinished,
) -> StageAdapter:
    """Write an adapter's folder.

    Args:
        folder: must not be there yet.
        tensors: from `tensors.trainable_tensors`.
        base: the checkpoint that they belong to.
        base_class: of the bare model, for `AutoPeftModel`.
        processor: the stage's.
        unfinished: makes the record.

    Raises:
        AdapterError: the folder is there already, or cannot be written.
    """
    # PEFT puts the path from which the base was loaded here; others have no use for it.
    published = replace(
        config,
        base_model_name_or_path=base.public_name,
        revision=base.revision,
        inference_mode=True,
        auto_mapping={"base_model_class": base_class.__name__, "parent_library": base_class.__module__},
    )

    def fill(partial: Path) -> None:
        published.save_pretrained(str(partial))
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        save_processor(processor, partial)
        config_sha256 = file_sha256(partial / CONFIG)
        sha256 = weights_sha256(partial)
        write_record(partial, unfinished(kind="adapter", sha256=sha256, config_sha256=config_sha256))

    return StageAdapter.load(adapter_folder(folder, fill))


def write_checkpoint(
    folder: Path,
    base: str | Path,
    dtype: torch.dtype | None,
    tensors: Tensors,
    processor: ProcessorMixin,
    unfinished: Unfinished,
) -> StageAdapter:
    """Write a full stage's folder: the base with the trained tensors in it.

    Args:
        folder: must not be there yet.
        base: Hub id or folder of the base.
        dtype: to write in; float32 holds the trained tensors unrounded. `None`: the base's stored one.
        tensors, processor, unfinished: as in `write_adapter`.

    Raises:
        AdapterError: the folder is there already, or cannot be written.
    """
    model, _ = load_checkpoint(base, dtype=dtype)
    load_tensors(model, tensors)
    set_stops(model, processor)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        save_processor(processor, partial)
        write_record(partial, unfinished(kind="checkpoint", sha256=weights_sha256(partial)))

    return StageAdapter.load(adapter_folder(folder, fill))


def write_record(folder: Path, record: StageRecord) -> None:
    """Write a stage's card and `stage.json`."""
    (folder / CARD).write_text(card_text(record, record.base.public_name), encoding="utf-8")
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")

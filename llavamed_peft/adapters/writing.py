"""Writing a stage's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save
from transformers import ProcessorMixin

from ..modeling.load import load_checkpoint
from ..modeling.processor import save_processor
from ..modeling.tensors import Tensors, load_tensors
from ..storage.hashing import file_sha256, weights_sha256
from ..storage.whole import write_folder
from .record import CARD, CONFIG, RECORD, SCHEMA_VERSION, WEIGHTS, public_name
from .stage_adapter import StageAdapter


def write_adapter(
    folder: Path,
    tensors: Tensors,
    config: LoraConfig,
    base_class: type,
    processor: ProcessorMixin,
    record: dict[str, Any],
    card: Callable[..., str],
) -> StageAdapter:
    """Write an adapter's folder, whole or not at all.

    Args:
        base_class: of the bare model, for `AutoPeftModel`.
        tensors: from `parts.trainable_tensors`.
        record: `stage.json` but for the kind and the weights' hash.
        card: makes the card's text of the finished record.
    """

    # PEFT puts the path from which the base was loaded here; others have no use for it
    published = replace(
        config,
        base_model_name_or_path=public_name(record["base"]),
        revision=record["base"]["revision"],
        inference_mode=True,
        auto_mapping={"base_model_class": base_class.__name__, "parent_library": base_class.__module__},
    )

    def fill(partial: Path) -> None:
        published.save_pretrained(str(partial))
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        save_processor(processor, partial)
        _finish(partial, {**record, "kind": "adapter"}, card)

    return StageAdapter.load(write_folder(folder, fill))


def write_checkpoint(
    folder: Path,
    base: str | Path,
    tensors: Tensors,
    processor: ProcessorMixin,
    record: dict[str, Any],
    card: Callable[..., str],
) -> StageAdapter:
    """Write a full stage's folder: the base with the trained tensors in it, in the dtype the base is stored in."""
    model, _ = load_checkpoint(base)
    load_tensors(model, tensors)

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        save_processor(processor, partial)
        _finish(partial, {**record, "kind": "checkpoint"}, card)

    return StageAdapter.load(write_folder(folder, fill))


def _finish(partial: Path, record: dict[str, Any], card: Callable[..., str]) -> None:
    config = {"config_sha256": file_sha256(partial / CONFIG)} if (partial / CONFIG).is_file() else {}
    record = {"schema_version": SCHEMA_VERSION, **record, "sha256": weights_sha256(partial), **config}
    (partial / CARD).write_text(card(record), encoding="utf-8")
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

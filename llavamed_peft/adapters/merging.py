"""A stage's adapter and its base as one checkpoint, with its record and card; or a full stage's checkpoint in
fewer bits.

An adapter that was trained over NF4 weights is merged onto what these weights stand for, which gives the
trained model; onto the original ones it would be another model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..errors import AdapterError, ConfigError
from ..modeling.generation import set_stops
from ..modeling.load import cast_weights, load_checkpoint, read_config, resolve_dtype
from ..modeling.processor import save_processor
from ..modeling.quantization import Quantization, dequantized, stored_quantization
from ..modeling.templates import read_template
from ..storage.hashing import weights_sha256
from .record import Base, Merged, Parent
from .stage_adapter import StageAdapter, adapter_folder, on_base, refuse_existing, stage_processor
from .writing import write_record

Onto = Literal["dequantised", "original"] | None
Measure = Callable[[torch.nn.Module, ProcessorMixin], float]


def merge(
    adapter: StageAdapter,
    base: str | Path,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    onto: Onto = None,
    measure: Measure | None = None,
) -> Path:
    """See `StageAdapter.merge`."""
    if adapter.is_checkpoint and dtype is None:
        raise AdapterError(
            f"{adapter.path}: is a checkpoint already; nothing to merge. Load it as it is, or pass dtype to "
            "write it in 16 bits."
        )
    if onto not in (None, "dequantised", "original"):
        raise ConfigError(f"onto is {onto!r}; wanted None, 'dequantised' or 'original'.")
    refuse_existing(Path(out))  # before a model is loaded
    chosen = None if adapter.is_checkpoint else _onto(adapter, base, onto)
    load = functools.partial(_merged_model, adapter, base, chosen)
    losses: dict[str, float | None] = {"eval_loss_after": None, "eval_loss_unrounded": None}
    if measure is not None:
        unrounded, processor = load(torch.float32)
        losses["eval_loss_unrounded"] = measure(unrounded, processor)
        del unrounded
    model, processor = load(resolve_dtype(dtype))
    written_in = model.dtype
    if measure is not None:  # what is written, computed as before it was rounded
        cast_weights(model, torch.float32)
        losses["eval_loss_after"] = measure(model, processor)
        cast_weights(model, written_in)
    record = replace(
        adapter.record,
        kind="checkpoint",
        base=adapter.record.base if chosen is None else Base.of(base, model.config),
        parent=Parent(stage=adapter.stage.name, sha256=adapter.record.sha256),
        merged=Merged(onto=chosen, dtype=str(written_in).removeprefix("torch.")),
        metrics=adapter.record.metrics | {"eval_loss_before": None} | losses,
        stop_tokens=read_template(processor).stop_tokens(processor),
        config_sha256=None,
    )

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        save_processor(processor, folder)
        write_record(folder, replace(record, sha256=weights_sha256(folder)))

    return adapter_folder(Path(out), fill)


def _onto(adapter: StageAdapter, base: str | Path, onto: Onto) -> str:
    """The weights that the adapter is merged onto, if the base has them."""
    stored = stored_quantization(base, read_config(base))
    if stored is not None and onto == "original":
        raise ConfigError(
            f"onto is 'original' and {base} is stored in {stored.upper()}; wanted 'dequantised', or the "
            "unquantised checkpoint as base."
        )
    over_nf4 = adapter.record.computing.get("quantization") == "nf4"
    return onto or ("dequantised" if over_nf4 or stored else "original")


def _merged_model(
    adapter: StageAdapter, base: str | Path, onto: str | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The merged model in a dtype, `None`: in the base's stored one; and the stage's processor."""
    if onto is None:
        model, processor = load_checkpoint(adapter.path, None, dtype)
        set_stops(model, processor)
        return model, processor
    quantization: Quantization = "nf4" if onto == "dequantised" else None
    model, _ = load_checkpoint(base, quantization, None if quantization else dtype)
    dtype = dtype or model.dtype
    model = dequantized(model, dtype)
    cast_weights(model, dtype)
    merged = on_base(model, base, adapter, quantization).merge_and_unload().eval()
    processor = stage_processor(adapter, merged)
    set_stops(merged, processor)
    return merged, processor

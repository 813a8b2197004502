"""The model of a stage as its training begins: the base, what trains in it, and what its parent left."""

from __future__ import annotations

from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from ..adapters.stage_adapter import check_arrived, check_fits, warn_of_another_base
from ..modeling.load import load_checkpoint
from ..modeling.quantization import Quantization, set_nf4_dtype
from ..modeling.scopes import adapter_config, attach, unfreeze_full
from ..modeling.tensors import load_tensors, set_dtypes
from ..stages import Stage
from .lineage import Lineage, carried_lora


class StageModel(NamedTuple):
    """A stage's model as its training begins.

    config: of its adapter; a full stage has none.
    stored_dtype: in which its base is stored.
    """

    model: torch.nn.Module
    config: LoraConfig | None
    stored_dtype: torch.dtype


def stage_model(
    stage: Stage, lineage: Lineage, quantization: Quantization, dtype: torch.dtype, seed: int
) -> StageModel:
    """The model of a stage.

    Args:
        lineage: where the stage begins.
        quantization: of the language model.
        dtype: of the frozen weights; what trains is float32.
        seed: of LoRA's first values.
    """
    # In the stored dtype: what trains begins unrounded
    model, _ = load_checkpoint(lineage.base, quantization)
    stored_dtype = model.dtype
    set_nf4_dtype(model, dtype)
    set_seed(seed)
    if stage.trains == "full":
        model = _full_model(model, lineage)
        set_dtypes(model, dtype)
        return StageModel(model, None, stored_dtype)
    config = adapter_config(model, stage.lora or carried_lora(lineage.adapter))
    model = attach(model, config, stage.trains)
    set_dtypes(model, dtype)
    if lineage.adapter is not None:
        load_tensors(model, lineage.adapter.tensors())
        warn_of_another_base(lineage.identity, lineage.adapter)
    return StageModel(model, config, stored_dtype)


def _full_model(model: PreTrainedModel, lineage: Lineage) -> torch.nn.Module:
    """The bare model with all that a full stage trains in fp32, and the parent's adapter merged into it."""
    set_dtypes(unfreeze_full(model), model.dtype)
    if lineage.adapter is None:
        return model
    check_fits(model, lineage.adapter)
    warn_of_another_base(lineage.identity, lineage.adapter)
    peft_model = PeftModel.from_pretrained(model, str(lineage.adapter.path))
    check_arrived(peft_model, lineage.adapter)
    return unfreeze_full(peft_model.merge_and_unload())

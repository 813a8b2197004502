"""The parts of a LLaVA model, by name.

All four classes use the same names for vision tower, projector, language model and `lm_head`. A stage's scope
becomes a set of parameter names (`scopes.py`). `image_newline` of LLaVA-NeXT and OneVision is a bare
parameter, which stock PEFT cannot carry in an adapter: it stays frozen in every scope.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import TrainingError

TOWER, PROJECTOR, LANGUAGE, HEAD = (
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
    "lm_head",
)


IN_PEFT = "base_model.model."  # comes before a parameter's own name in a PEFT model


def own_name(name: str) -> str:
    """A parameter's name in a PEFT model → its name in the bare one; LoRA's are `….q_proj.lora_A.weight`."""
    return name.removeprefix(IN_PEFT).replace(".modules_to_save.default.", ".").replace(".default.", ".")


def is_lora(name: str) -> bool:
    """A parameter of this name in a PEFT model is LoRA's."""
    return ".lora_" in name


def language_linears(model: PreTrainedModel) -> list[str]:
    """Names of the language model's linear layers, 4-bit ones included; `lm_head` is not one of them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(LANGUAGE + ".")
    ]


def sharding_units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What a sharded model gathers at a time: each layer of the language model and of the vision tower.

    Whole models inside the model are no such unit: FSDP2 changes the class of a unit, and transformers finds
    by the class what a model returns, such as the tower's hidden states.

    Raises:
        TrainingError: the language model has no layers that can be recognised.
    """
    units = {
        part: [
            m for m in bare(model).get_submodule(part).modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        for part in (LANGUAGE, TOWER)
    }
    if not units[LANGUAGE]:
        raise TrainingError(
            f"{type(bare(model).get_submodule(LANGUAGE)).__name__} has no layers that transformers can "
            "checkpoint, so it cannot be sharded layer by layer; launch without FSDP."
        )
    return units[LANGUAGE] + units[TOWER]


def bare(model: torch.nn.Module) -> PreTrainedModel:
    """The LLaVA model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

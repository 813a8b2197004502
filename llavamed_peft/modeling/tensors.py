"""A stage's tensors: out of a model, into one, and in which dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ..errors import AdapterError
from .parts import is_lora
from .sharding import free_gathered, whole

Tensors = dict[str, torch.Tensor]


def set_dtypes(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Trainable tensors in fp32, the frozen rest in the compute dtype; 4-bit weights stay as they are.

    At rates of 2e-5 a bf16 weight may never change: its steps are smaller than its last place. A frozen LoRA
    that a projector stage carries is fp32 too, so that the stage saves it unrounded.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtype = torch.float32 if parameter.requires_grad or is_lora(name) else compute_dtype
            parameter.data = parameter.data.to(dtype)


def trainable_tensors(model: torch.nn.Module) -> Tensors:
    """What a stage saves, in full, on the CPU: an adapter's tensors under PEFT's names, or trained weights.

    A frozen LoRA that a projector stage carries is part of it. Every writer and reader of stages uses this
    mapping. Where the model is sharded, every process has to call this; the main one gets the tensors, the
    others an empty mapping.
    """
    free_gathered(model)
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    is_sharded = False
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or is_lora(name):
            full = whole(parameter)
            is_sharded |= full is not parameter
            if is_main or not is_sharded:
                tensors[name] = full.detach().to("cpu", copy=True).contiguous()
    if is_sharded and not is_main:
        return {}
    return (
        get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
        if isinstance(model, PeftModel)
        else tensors
    )


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of `trainable_tensors` into a model; every tensor must find its place.

    The model may have more: a parent's tensors may be fewer.

    Raises:
        AdapterError: a tensor has no place in the model, or another shape than its place.
    """
    if isinstance(model, PeftModel):
        places = {
            name: tensor.shape
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    else:
        places = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_places({name: tensor.shape for name, tensor in tensors.items()}, places, "the model")
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(tensors))
    else:
        model.load_state_dict(dict(tensors), strict=False)


def check_places(
    tensors: Mapping[str, torch.Size], places: Mapping[str, torch.Size], model_name: str
) -> None:
    """Each tensor has a place of its name and shape.

    Raises:
        AdapterError: one has none; the message says which, and both shapes.
    """
    homeless = sorted(name for name in tensors if name not in places)
    misfits = sorted(
        name for name in tensors if name in places and tuple(tensors[name]) != tuple(places[name])
    )
    if homeless or misfits:
        example = (
            f"{misfits[0]} is {tuple(tensors[misfits[0]])} in the file and {tuple(places[misfits[0]])} in "
            "the model"
            if misfits
            else f"{homeless[0]} is in the file and not in the model"
        )
        raise AdapterError(
            f"{len(homeless) + len(misfits)} of {len(tensors)} tensors do not fit {model_name}: {example}. "
            "It was trained on another architecture; load it on the base that its stage.json names."
        )

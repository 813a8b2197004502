"""Which parts of a LLaVA model a stage trains, proven name by name.

All four classes name their parts alike: vision tower, projector, language model, `lm_head`. A stage's scope becomes a set of
parameter names, adapters are attached by stock PEFT, and the set that requires grad must be that set. LLaVA-NeXT's and
OneVision's `image_newline` is a bare parameter, which stock PEFT cannot carry in an adapter: it stays frozen in every scope.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import AdapterError, TrainingError
from ..stages import LoraSpec, Scope
from .sharding import free_gathered, whole

TOWER, PROJECTOR, LANGUAGE, HEAD = "model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"
# Matches no module. PEFT has no documented way to say "modules_to_save only"; a test pins that this one works.
NO_TARGET = "dummy-target-modules"
_CHANNELS = 3  # of pixels

IN_PEFT = "base_model.model."  # stands before a parameter's own name in a PEFT model

Tensors = dict[str, torch.Tensor]


def adapter_config(model: PreTrainedModel, lora: LoraSpec | None) -> LoraConfig:
    """The stock PEFT configuration of a stage: the projector in full and, if given, LoRA on every linear of the language model.

    Args:
        model: the bare model; its linears are read off it, so that any language model works.
        lora: rank, alpha and dropout, or `None` for the projector alone.
    """
    in_full = [PROJECTOR.split(".")[-1]]
    if lora is None:
        return LoraConfig(target_modules=NO_TARGET, modules_to_save=in_full)
    kinds = sorted({name.rsplit(".", 1)[1] for name in language_linears(model)})
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{re.escape(LANGUAGE)}\..*\.({'|'.join(kinds)})",
        modules_to_save=in_full,
    )


def own_name(name: str) -> str:
    """A parameter's name in a PEFT model → its name in the bare one; LoRA's are `….q_proj.lora_A.weight`."""
    return name.removeprefix(IN_PEFT).replace(".modules_to_save.default.", ".").replace(".default.", ".")


def is_lora(name: str) -> bool:
    """A parameter of this name in a PEFT model is LoRA's."""
    return ".lora_" in name


def language_linears(model: PreTrainedModel) -> list[str]:
    """Names of the language model's linear layers, 4-bit ones included; `lm_head` is not one of them."""
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name.startswith(LANGUAGE + ".")
    ]


def attach(model: PreTrainedModel, config: LoraConfig, trains: Scope) -> PeftModel:
    """Put a fresh adapter on the model in which exactly the scope's parameters require grad.

    Raises:
        TrainingError: they do not; the message names the difference.
    """
    wanted = _trainable_names(model, trains)
    peft_model = get_peft_model(model, config)
    if trains == "projector":
        for name, parameter in peft_model.named_parameters():
            if is_lora(name):
                parameter.requires_grad_(False)
    check_trainable(peft_model, wanted)
    return peft_model


def unfreeze_full(model: PreTrainedModel) -> PreTrainedModel:
    """Make projector, language model and `lm_head` trainable in place, and nothing else.

    Raises:
        TrainingError: something else requires grad afterwards.
    """
    wanted = _trainable_names(model, "full")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    check_trainable(model, wanted)
    return model


def check_trainable(model: torch.nn.Module, wanted: set[str]) -> None:
    """Compare what requires grad with what should, name by name.

    Raises:
        TrainingError: the sets differ; the message names up to three of each side.
    """
    actual = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if actual != wanted:
        extra, lacking = sorted(actual - wanted), sorted(wanted - actual)
        raise TrainingError(
            f"{len(extra)} parameter(s) would train that should not ({', '.join(extra[:3]) or 'none'}), and {len(lacking)} "
            f"would not that should ({', '.join(lacking[:3]) or 'none'}). "
            "The checkpoint's modules are named otherwise than its class's."
        )


def _trainable_names(model: PreTrainedModel, trains: Scope) -> set[str]:
    parameters = [name for name, _ in model.named_parameters()]
    projector = {name for name in parameters if name.startswith(PROJECTOR + ".")}
    if trains == "full":
        return projector | {name for name in parameters if name.startswith((LANGUAGE + ".", HEAD + "."))}
    in_peft = {f"{IN_PEFT}{PROJECTOR}.modules_to_save.default{name[len(PROJECTOR) :]}" for name in projector}
    if trains == "projector":
        return in_peft
    linears = language_linears(model)
    return in_peft | {f"{IN_PEFT}{name}.lora_{side}.default.weight" for name in linears for side in "AB"}


def freeze_tower(model: torch.nn.Module) -> None:
    """Run the vision tower without a graph and always in eval mode, whatever mode the model is put in.

    Its parameters never require grad, but gradient checkpointing asks for gradients of every embedding's output, the tower's
    too, and would carry them through it. Given features (`tower_features`) in the place of pixels, it hands them on.
    """
    tower = bare(model).model.vision_tower
    tower.eval()
    tower.train = functools.partial(_stay_in_eval, tower)
    tower.forward = functools.partial(_look_or_hand_on, model, torch.no_grad()(tower.forward))


def tower_positions(tower: torch.nn.Module) -> int:
    """Positions that a vision tower makes of a tile: one for each patch and, in CLIP, one for the CLS token."""
    return int(tower.embeddings.position_embedding.num_embeddings)


def tower_layers(model: torch.nn.Module) -> list[int]:
    """Which of the vision tower's hidden states the projector is given, ascending; 0 is what goes into its first layer."""
    config = bare(model).config
    chosen = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return sorted({layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen)})


def tower_features(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower makes of images, as the projector needs it.

    Args:
        model: its tower frozen by `freeze_tower`.
        pixel_values: [tiles, 3, height, width].

    Returns:
        [tiles, positions, layers, width], the layers those of `tower_layers`. In the place of `pixel_values` (those of
        LLaVA-NeXT and OneVision have the tiles of each image in a dimension of their own) the model takes them as what they are.
    """
    layers = tower_layers(model)
    states = bare(model).model.vision_tower(pixel_values, output_hidden_states=layers).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2)


def _look_or_hand_on(model: torch.nn.Module, forward: Any, pixel_values: torch.Tensor, **settings: Any) -> Any:
    if pixel_values.shape[1] == _CHANNELS:  # no tower has three positions: they are a square, or one more
        return forward(pixel_values, **settings)
    states: list[torch.Tensor | None] = [None] * (bare(model).config.vision_config.num_hidden_layers + 1)
    for number, layer in enumerate(tower_layers(model)):
        states[layer] = pixel_values[:, :, number]
    return BaseModelOutputWithPooling(hidden_states=tuple(states))


def _stay_in_eval(tower: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return tower


def always_look(model: torch.nn.Module) -> None:
    """Run vision tower and projector in every forward: one without an image looks at a blank one, which counts nothing.

    So every trainable tensor has a gradient in every step (perhaps zero), and processes that gather a sharded model's weights
    part by part, each when it runs, all gather the same parts in the same order; otherwise one would wait for ever.
    """
    inner = bare(model).model
    inner.forward = functools.partial(_forward_with_an_image, inner, inner.forward)


def _forward_with_an_image(inner: PreTrainedModel, forward: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    if inputs.get("pixel_values") is None:
        embeddings = inner.get_input_embeddings()(input_ids)
        size = inner.config.vision_config.image_size
        seen = inner.vision_tower(torch.zeros(1, 3, size, size, device=embeddings.device)).last_hidden_state[:, :1]
        projector = inner.multi_modal_projector
        layers = projector.linear_1.in_features // seen.shape[-1]  # the features of several may be joined
        inputs["inputs_embeds"] = embeddings + projector(seen.repeat(1, 1, layers)).sum() * 0.0
        input_ids = None
    return forward(input_ids=input_ids, **inputs)


def sharding_units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is gathered by itself where a model is sharded: each layer of the language model and of the vision tower.

    Whole models inside the model are no such unit: FSDP2 gives a unit another class, and transformers looks up by the class what
    a model hands out, the tower's hidden states for one.

    Raises:
        TrainingError: the language model's layers cannot be told.
    """
    units = {
        part: [m for m in bare(model).get_submodule(part).modules() if isinstance(m, GradientCheckpointingLayer)]
        for part in (LANGUAGE, TOWER)
    }
    if not units[LANGUAGE]:
        raise TrainingError(
            f"{type(bare(model).get_submodule(LANGUAGE)).__name__} has no layers that transformers can checkpoint, so it cannot "
            "be sharded layer by layer; launch without FSDP."
        )
    return units[LANGUAGE] + units[TOWER]


def bare(model: torch.nn.Module) -> PreTrainedModel:
    """The LLaVA model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def set_dtypes(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Trainable tensors in fp32, the frozen rest in the compute dtype; 4-bit weights stay as they are.

    At rates of 2e-5 a bf16 weight can stand still: its steps are smaller than its last place. A frozen LoRA that a projector
    stage carries is fp32 too, so that the stage hands it on unrounded.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            dtype = torch.float32 if parameter.requires_grad or is_lora(name) else compute_dtype
            parameter.data = parameter.data.to(dtype)


def trainable_tensors(model: torch.nn.Module) -> Tensors:
    """What a stage leaves, whole, on the CPU: an adapter's tensors under PEFT's names, or a full stage's trained weights.

    A frozen LoRA that a projector stage carries is part of it. Every writer and reader of stages goes through this mapping. Where
    the model is sharded, every process has to call this, and the main one gets the tensors, the others an empty mapping.
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
    return get_peft_model_state_dict(model, tensors, save_embedding_layers=False) if isinstance(model, PeftModel) else tensors


def load_tensors(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `trainable_tensors`: every tensor must find its place. A parent's may be fewer than the model's.

    Raises:
        AdapterError: a tensor has no place in the model, or another shape than its place.
    """
    if isinstance(model, PeftModel):
        places = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    else:
        places = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_places({name: tensor.shape for name, tensor in tensors.items()}, places, "the model")
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(tensors))
    else:
        model.load_state_dict(dict(tensors), strict=False)


def check_places(tensors: Mapping[str, torch.Size], places: Mapping[str, torch.Size], model_name: str) -> None:
    """Each tensor has a place of its name and shape.

    Raises:
        AdapterError: one has not; the message says which, and both shapes.
    """
    homeless = sorted(name for name in tensors if name not in places)
    misfits = sorted(name for name in tensors if name in places and tuple(tensors[name]) != tuple(places[name]))
    if homeless or misfits:
        example = (
            f"{misfits[0]} is {tuple(tensors[misfits[0]])} in the file and {tuple(places[misfits[0]])} in the model"
            if misfits
            else f"{homeless[0]} is in the file and not in the model"
        )
        raise AdapterError(
            f"{len(homeless) + len(misfits)} of {len(tensors)} tensors do not fit {model_name}: {example}. "
            "It was trained on another architecture; load it on the base that its stage.json names."
        )

"""What a stage trains, proven name by name."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..errors import TrainingError
from ..stages import LoraSpec, Scope
from .parts import HEAD, IN_PEFT, LANGUAGE, PROJECTOR, is_lora, language_linears

# Matches no module. PEFT has no documented way to say "modules_to_save only"; a test checks that this works.
NO_TARGET = "dummy-target-modules"


def adapter_config(model: PreTrainedModel, lora: LoraSpec | None) -> LoraConfig:
    """The stock PEFT configuration of a stage: the projector in full and perhaps LoRA.

    Args:
        model: the bare model; the names of its linears are read from it, so any language model works.
        lora: of every linear of the language model: rank, alpha and dropout; `None`: the projector alone.
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


def attach(model: PreTrainedModel, config: LoraConfig, trains: Scope) -> PeftModel:
    """Put a fresh adapter on the model, in which exactly the scope's parameters require grad.

    Raises:
        TrainingError: other parameters do; the message names the difference.
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
            f"{len(extra)} parameter(s) would train that should not ({', '.join(extra[:3]) or 'none'}), and "
            f"{len(lacking)} would not that should ({', '.join(lacking[:3]) or 'none'}). The checkpoint's "
            "modules have other names than its class's."
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

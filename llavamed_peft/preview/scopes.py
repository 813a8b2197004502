"""What each stage would train, by module."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from ..modeling.load import empty_model
from ..modeling.parts import own_name
from ..modeling.scopes import adapter_config, attach, unfreeze_full
from ..modeling.tensors import set_dtypes
from ..reporting.text import aligned, indented
from ..stages import LoraSpec, Scope, Stage

# What trains


def trainable_parameters(
    config: PreTrainedConfig, trains: Scope, lora: LoraSpec | None
) -> dict[str, torch.Tensor]:
    """What a stage would train: name → parameter on the meta device, in the dtype in which it trains.

    The names are the checkpoint's own, with LoRA's `….q_proj.lora_A.weight` among them.

    Raises:
        TrainingError: the checkpoint's class has other parts than the scope names.
    """
    empty = empty_model(config)
    stored = empty.dtype
    model = unfreeze_full(empty) if trains == "full" else attach(empty, adapter_config(empty, lora), trains)
    set_dtypes(model, stored)
    return {
        own_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def what_trains(base: str, config: PreTrainedConfig, stages: Sequence[Stage]) -> Iterator[str]:
    model = empty_model(config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    dtype = _dtype_name(model.dtype)
    language_model, vision_tower = (config.get_text_config().model_type, config.vision_config.model_type)
    yield f"{base}: {config.model_type} over {language_model} and {vision_tower}"
    yield f"  {everything:,} parameters, stored in {dtype}"
    yield "\nwhat trains"
    shown: dict[tuple[Scope, LoraSpec | None], str] = {}
    for stage in stages:
        key = (stage.trains, stage.lora)
        spec = (
            f" (rank {stage.lora.rank}, alpha {stage.lora.alpha:g}, dropout {stage.lora.dropout:g})"
            if stage.lora
            else ""
        )
        if key in shown:
            yield f"  {stage.name}: {stage.trains}{spec}, the same as {shown[key]}"
            continue
        shown[key] = stage.name
        parameters = trainable_parameters(config, stage.trains, stage.lora)
        count = sum(parameter.numel() for parameter in parameters.values())
        dtypes = ", ".join(sorted({_dtype_name(parameter.dtype) for parameter in parameters.values()}))
        yield (
            f"  {stage.name}: {stage.trains}{spec}, {count:,} parameters in {len(parameters):,} tensors, "
            f"{dtypes}; {count / everything:.2%} of the checkpoint"
        )
        yield from indented(4, aligned(_by_module(parameters), right={1, 3}))


def _by_module(parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Rows of module, how many of its kind, its tensors' shapes, parameters; layers that are alike are one
    row."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in parameters.items():
        module, tensor = re.fullmatch(r"(.+?)\.(lora_\w+\.\w+|\w+)", name).groups()
        modules[module][tensor.removesuffix(".weight")] = "×".join(map(str, parameter.shape))
        sizes[module] += parameter.numel()
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tensors in modules.items():
        shapes = ", ".join(f"{tensor} {shape}" for tensor, shape in tensors.items())
        kinds[re.sub(r"\b\d+\b", "*", module), shapes].append(module)
    return [
        [
            _range_of(kind, alike),
            f"×{len(alike)}" if len(alike) > 1 else "",
            shapes,
            f"{sum(sizes[name] for name in alike):,}",
        ]
        for (kind, shapes), alike in kinds.items()
    ]


def _range_of(kind: str, modules: Sequence[str]) -> str:
    """`layers.0-31.mlp` for 32 layers in a row; where some are left out, `layers.*.mlp`."""
    numbers = [int(number) for module in modules for number in re.findall(r"\b\d+\b", module)]
    if kind.count("*") == 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return kind.replace("*", f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return kind


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

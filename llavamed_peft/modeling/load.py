"""A Hub id or folder of a LLaVA checkpoint → (model, processor), complete or not at all.

Four classes of `transformers` are known: LLaVA, LLaVA-NeXT, ViP-LLaVA and LLaVA-OneVision, over any language
model they can be built from and a CLIP or SigLIP tower. Weights that are missing, left over or of another
shape, or that are not finite, are errors here; the library only warns. Quantised weights are the matter of
`quantization.py`. Checkpoints in the original LLaVA format (such as LLaVA-Med v1.5's `llava_mistral`) are not
converted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..errors import CheckpointError, ConfigError
from .processor import load_processor
from .quantization import (
    Quantization,
    check_quantization,
    guard_nf4,
    linear4bits,
    loading_settings,
    refuse_bare_fp8,
    set_nf4_dtype,
    stored_quantization,
)

MODEL_TYPES = ("llava", "llava_next", "vipllava", "llava_onevision")
TOWERS = ("clip_vision_model", "siglip_vision_model")
# Classes that cut an image into tiles and put their features back together on a grid
TILED = ("llava_next", "llava_onevision")
# Buffers that older checkpoints stored and today's classes compute themselves.
_COMPUTED_BUFFERS = (".position_ids", ".inv_freq")


def load_checkpoint(
    model: str | Path, quantization: Quantization = None, dtype: str | torch.dtype | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a LLaVA checkpoint for training or inference.

    Args:
        model: Hub id, or folder of a checkpoint in Hugging Face format.
        quantization: `None`, or `"nf4"`: the language model's linears in 4-bit NormalFloat with double
            quantisation (QLoRA, arXiv:2305.14314) and everything else in `dtype`. A checkpoint that is stored
            in NF4 is loaded so either way.
        dtype: of the floating-point weights, such as `torch.bfloat16` or `"bfloat16"`; `None` takes the one
            in which the checkpoint is stored. 4-bit weights are made of the stored ones in any case.

    Returns:
        The model in eval mode (on the CPU; under `nf4` with a GPU, on the GPU), and its processor, with what
        a Hub folder often lacks (`patch_size`, the number of extra tokens of the tower) filled in from the
        model's configuration.

    Raises:
        CheckpointError: it is no LLaVA checkpoint or not complete, its weights are not finite or quantised in
            another way, or its processor does not fit it.
        ConfigError: an unknown `quantization` or `dtype`.
    """
    check_quantization(quantization)
    config = read_config(model)
    stored = stored_quantization(model, config)
    quantization = quantization or stored
    wanted = resolve_dtype(dtype)
    try:
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            str(model),
            dtype="auto" if wanted is None or quantization else wanted,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all at once
            **loading_settings(quantization, config),
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, ImportError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model}: the weights cannot be loaded: {error}") from error
    _check_complete(str(model), info)
    refuse_bare_fp8(model)  # of a Hub id, now that its files are here
    _check_finite(str(model), loaded)
    if quantization == "nf4":
        guard_nf4(model, loaded, is_stored=stored is not None)
        set_nf4_dtype(loaded, wanted or torch.bfloat16)
        if wanted is not None:
            cast_weights(loaded, wanted)
    return loaded, load_processor(model, config)


def read_config(model: str | Path) -> PreTrainedConfig:
    """The configuration of a LLaVA checkpoint, without its weights.

    Raises:
        CheckpointError: nothing is there, it is not one of the four LLaVA classes, its tower is neither CLIP
            nor SigLIP, its weights are quantised in a way that cannot be trained over, or its
            `vision_feature_select_strategy` does not fit its tower.
    """
    try:
        plain, _ = PreTrainedConfig.get_config_dict(str(model))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model}: no configuration could be read; wanted a folder with config.json or a Hub id. "
            f"({error})"
        ) from error
    if not plain:
        raise CheckpointError(f"{model}: has no config.json; wanted a folder of a checkpoint or a Hub id.")
    model_type = plain.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{model}: model_type is {model_type!r}; wanted one of {', '.join(MODEL_TYPES)}. A text-only "
            "model has no projector to train, and a checkpoint in the original LLaVA format must be "
            "converted first (the llava-hf checkpoints are)."
        )
    config = AutoConfig.from_pretrained(str(model))
    if config.vision_config.model_type not in TOWERS:
        raise CheckpointError(
            f"{model}: its vision tower is {config.vision_config.model_type!r}; wanted one of "
            f"{', '.join(TOWERS)}. Others make another number of tokens of an image, which the stages would "
            "count wrongly."
        )
    _check_features(str(model), config)
    stored_quantization(model, config)
    refuse_bare_fp8(model)
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on torch's meta device: names, shapes and dtypes, but no weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`"bfloat16"` or `torch.bfloat16` → `torch.bfloat16`; `None` stays `None`.

    Raises:
        ConfigError: not a floating-point dtype of torch.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ConfigError(
            f"dtype is {dtype!r}; wanted None or a floating-point dtype such as 'bfloat16' or 'float32'."
        )
    return resolved


def _check_complete(name: str, info: dict[str, Any]) -> None:
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith(_COMPUTED_BUFFERS)]
    problems = [
        f"{len(keys)} {kind} ({', '.join(sorted(map(str, keys))[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in (
            ("missing", info["missing_keys"]),
            ("unexpected", unexpected),
            ("of another shape", [key[0] for key in info["mismatched_keys"]]),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{name}: weights {'; '.join(problems)}; wanted each of the model's weights exactly once. "
            "Is a shard missing, or is config.json another model's?"
        )


def _check_features(name: str, config: PreTrainedConfig) -> None:
    """Classes that put tiles together need one feature a patch: CLIP's CLS token must be dropped, and SigLIP
    has none to drop."""
    has_cls, drops = config.vision_config.model_type == "clip_vision_model", _strategy(config) == "default"
    if config.model_type in TILED and has_cls != drops:
        raise CheckpointError(
            f"{name}: vision_feature_select_strategy is {_strategy(config)!r} with a "
            f"{config.vision_config.model_type}; wanted {('default' if has_cls else 'full')!r}, since "
            f"{config.model_type} puts the patches of its tiles back on their grid. Correct config.json."
        )


def _strategy(config: PreTrainedConfig) -> str:
    return str(getattr(config, "vision_feature_select_strategy", "default"))


def _check_finite(name: str, model: PreTrainedModel) -> None:
    """Weights that hold infinity or NaN, which the first step's loss would only be `nan` of."""
    broken = [
        key
        for key, parameter in model.named_parameters()
        if parameter.is_floating_point() and not torch.isfinite(parameter).all()
    ]
    for key, module in linear4bits(model).items():
        state = module.weight.quant_state
        scales = state.absmax if state.offset is None else state.offset  # doubly quantised: their mean
        if not torch.isfinite(scales.float()).all():
            broken.append(f"{key}.weight")
    if broken:
        raise CheckpointError(
            f"{name}: {len(broken)} of its weights hold infinity or NaN ({', '.join(broken[:3])}"
            f"{', …' if len(broken) > 3 else ''}); wanted finite ones. Was it saved by a run that diverged, "
            "or in a dtype too small for it? Take another copy."
        )


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights that are not quantised, in another dtype, in place; buffers keep theirs, as when a model is
    loaded."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype

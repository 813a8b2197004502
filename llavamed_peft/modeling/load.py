"""A Hub id or folder of a LLaVA checkpoint → (model, processor), complete or not at all.

Four classes of `transformers` are known: LLaVA, LLaVA-NeXT, ViP-LLaVA and LLaVA-OneVision, over any language
model they can be built from and a CLIP or SigLIP tower. Weights that are missing, left over or of another
shape are errors here; the library only warns. NF4 loading keeps vision tower, projector and `lm_head` in
16/32 bit and checks that it did. Checkpoints in the original LLaVA format (such as LLaVA-Med v1.5's
`llava_mistral`) are not converted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..errors import CheckpointError, ConfigError
from .processor import load_processor

MODEL_TYPES = ("llava", "llava_next", "vipllava", "llava_onevision")
TOWERS = ("clip_vision_model", "siglip_vision_model")
NF4_BLOCK = 64  # weights that share one scale; see bitsandbytes.functional.quantize_4bit
# Kept in 16/32 bit. transformers matches these from the start of a module's name, so a bare
# "multi_modal_projector" would miss.
NOT_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
# Buffers that older checkpoints stored and today's classes compute themselves.
_COMPUTED_BUFFERS = (".position_ids", ".inv_freq")

Quantization = Literal["nf4"] | None


def load_checkpoint(
    model: str | Path, quantization: Quantization = None, dtype: str | torch.dtype | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a LLaVA checkpoint for training or inference.

    Args:
        model: Hub id, or folder of a checkpoint in Hugging Face format.
        quantization: `None`, or `"nf4"`: the language model's linears in 4-bit NormalFloat with double
            quantisation (QLoRA, arXiv:2305.14314) and everything else in `dtype`.
        dtype: of the floating-point weights, such as `torch.bfloat16` or `"bfloat16"`; `None` takes the one
            in which the checkpoint is stored.

    Returns:
        The model in eval mode (on the CPU; under `nf4` with a GPU, on the GPU), and its processor, with what
        a Hub folder often lacks (`patch_size`, the number of extra tokens of the tower) filled in from the
        model's configuration.

    Raises:
        CheckpointError: it is no LLaVA checkpoint or not complete, or its processor does not fit it.
        ConfigError: an unknown `quantization` or `dtype`.
    """
    check_quantization(quantization)
    config = read_config(model)
    wanted = resolve_dtype(dtype)
    extra: dict[str, Any] = {}
    if quantization == "nf4":
        if not torch.cuda.is_available():
            _check_blocks(config)
        extra["quantization_config"] = _nf4_config(wanted)
    try:
        loaded, info = AutoModelForImageTextToText.from_pretrained(
            str(model),
            dtype="auto" if wanted is None else wanted,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all at once
            **extra,
        )
    except (OSError, SafetensorError, ImportError, ValueError) as error:
        raise CheckpointError(f"{model}: the weights cannot be loaded: {error}") from error
    _check_complete(str(model), info)
    if quantization == "nf4":
        _make_nf4_safe_on_cpu(loaded)
        _check_quantized(loaded)
    return loaded, load_processor(model, config)


def check_quantization(quantization: object) -> None:
    """Raise `ConfigError` for anything but `None` and `"nf4"`."""
    if quantization not in (None, "nf4"):
        raise ConfigError(f"quantization is {quantization!r}; wanted None or 'nf4'.")


def read_config(model: str | Path) -> PreTrainedConfig:
    """The configuration of a LLaVA checkpoint, without its weights.

    Raises:
        CheckpointError: nothing is there, it is not one of the four LLaVA classes, or its tower is neither
            CLIP nor SigLIP.
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


def _nf4_config(dtype: torch.dtype | None) -> BitsAndBytesConfig:
    on_gpu = torch.cuda.is_available()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # On a CPU fp32 is the fastest.
        bnb_4bit_compute_dtype=(dtype or torch.bfloat16) if on_gpu else torch.float32,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def _check_blocks(config: PreTrainedConfig) -> None:
    """On a CPU, bitsandbytes 0.50 dequantises rows wrongly and silently if they end inside a block."""
    text = config.get_text_config()
    widths = {name: getattr(text, name, NF4_BLOCK) for name in ("hidden_size", "intermediate_size")}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths["num_attention_heads × head_dim"] = text.num_attention_heads * head
    for name, width in widths.items():
        if width % NF4_BLOCK:
            raise CheckpointError(
                f"The language model's {name} is {width}; NF4 on a CPU needs a multiple of {NF4_BLOCK} "
                "(bitsandbytes reads other widths wrongly without saying so). Use quantization=None."
            )


def _make_nf4_safe_on_cpu(model: PreTrainedModel) -> None:
    """Switch off a fast path of avx512_bf16: after a forward in eval mode, it trains without gradients."""
    for module in _linear4bits(model).values():
        module.support_avx512bf16_for_cpu = False


def _check_quantized(model: PreTrainedModel) -> None:
    quantized = _linear4bits(model)
    wrongly = [name for name in quantized if name.startswith(NOT_QUANTIZED)]
    left_out = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.startswith("model.language_model.")
        and name not in quantized
    ]
    if wrongly or left_out:
        raise CheckpointError(
            f"NF4 loading quantised {wrongly[:3] or 'nothing wrongly'} and left out "
            f"{left_out[:3] or 'nothing'}; wanted exactly the linears of model.language_model in 4 bit."
        )


def _linear4bits(model: PreTrainedModel) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}

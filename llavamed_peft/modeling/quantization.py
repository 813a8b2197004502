"""4-bit language models (NF4, QLoRA's arXiv:2305.14314), and which quantised checkpoints can be used at all.

Two ways lead to the same model: an unquantised checkpoint with `quantization="nf4"`, and a folder that
bitsandbytes stored in NF4. Both keep vision tower, projector and `lm_head` in 16 or 32 bits, and both pass
the same guards. Block-fp8 checkpoints are dequantised while they load. Every other stored quantisation is
refused by name, since nothing here was tested on it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigError

Quantization = Literal["nf4"] | None

NF4_BLOCK = 64  # weights that share one scale; see bitsandbytes.functional.quantize_4bit
# Kept in 16/32 bit. transformers matches these from the start of a module's name, so a bare
# "multi_modal_projector" would miss.
NOT_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
# As a safetensors header names the 8-bit floats, and what follows a weight's name in that of its scale
_FP8, _SCALES = ("F8_E4M3", "F8_E5M2"), ("_scale_inv", "_scale")


def check_quantization(quantization: object) -> None:
    """Raise `ConfigError` for anything but `None` and `"nf4"`, and for NF4 without bitsandbytes."""
    if quantization not in (None, "nf4"):
        raise ConfigError(f"quantization is {quantization!r}; wanted None or 'nf4'.")
    if quantization == "nf4":
        _require_bitsandbytes("quantization is 'nf4'")


def stored_quantization(name: str | Path, config: PreTrainedConfig) -> Quantization:
    """In what a checkpoint is stored: `"nf4"`, or `None` where its weights can be used as they are.

    Args:
        name: Hub id or folder, for errors.
        config: of the checkpoint.

    Raises:
        CheckpointError: its weights are quantised in another way.
        ConfigError: it is NF4 and bitsandbytes is not installed.
    """
    settings = stored_settings(config)
    if not settings or settings.get("quant_method") == "fp8":
        return None
    method = settings.get("quant_method")
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        if kind == "nf4":
            _require_bitsandbytes(f"{name} is stored in NF4")
            return "nf4"
        method = f"bitsandbytes 4 bit, {kind}"
    elif method in (None, "bitsandbytes"):
        method = "bitsandbytes 8 bit" if settings.get("load_in_8bit") else "an unknown method"
    raise CheckpointError(
        f"{name}: its weights are stored quantised ({method}); wanted 16 or 32 bits, or bitsandbytes NF4. "
        "Take the unquantised checkpoint; quantization='nf4' makes its language model 4 bits."
    )


def stored_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint or of its language model; empty where it has none."""
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def refuse_bare_fp8(model: str | Path) -> None:
    """Refuse 8-bit floats that were stored without the scales they mean something with; of each file only
    the header is read.

    Args:
        model: Hub id or folder; a file that is not on this machine is passed over.

    Raises:
        CheckpointError: there are some; the message names one.
    """
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(str(model), "config.json")
        if not isinstance(cached, str):
            return
        folder = Path(cached).parent
    names: dict[str, str] = {}  # tensor → dtype, as the header names it
    for file in sorted(folder.glob("*.safetensors")):
        names |= _header(file)
    bare = [
        name
        for name, dtype in names.items()
        if dtype in _FP8 and not any(name + scale in names for scale in _SCALES)
    ]
    if bare:
        raise CheckpointError(
            f"{model}: {len(bare)} weights are stored in fp8 without their scales ({bare[0]}); wanted 16 or "
            "32 bits. Take the unquantised checkpoint."
        )


def _header(file: Path) -> dict[str, str]:
    """Tensor → dtype, as a safetensors file says it; a damaged one is for the loader to report."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return {}


def loading_settings(quantization: Quantization, config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is told about the quantisation of a model.

    Raises:
        CheckpointError: bitsandbytes would read the language model's widths wrongly.
    """
    stored = stored_settings(config)
    if stored.get("quant_method") == "fp8":  # a GPU would compute with them, and nothing could train
        kept = stored.get("modules_to_not_convert")
        return {"quantization_config": FineGrainedFP8Config(dequantize=True, modules_to_not_convert=kept)}
    if quantization is None:
        return {}
    if not torch.cuda.is_available():
        _check_blocks(config)
    if stored:
        return {}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=list(NOT_QUANTIZED),
        )
    }


def guard_nf4(name: str | Path, model: PreTrainedModel, is_stored: bool) -> None:
    """Check what was quantised, and make it safe to train over.

    Args:
        name: Hub id or folder, for errors.
        is_stored: the checkpoint itself is NF4; it may have left layers of the language model out.

    Raises:
        CheckpointError: something else than the language model's linears is in 4 bits, or one is not.
    """
    quantized = linear4bits(model)
    wrongly = [module for module in quantized if module.startswith(NOT_QUANTIZED)]
    left_out = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module_name.startswith("model.language_model.")
        and module_name not in quantized
    ]
    if wrongly or (left_out and not is_stored) or not quantized:
        raise CheckpointError(
            f"{name}: in 4 bits are {', '.join(wrongly[:3]) or 'only parts of the language model'}, and not "
            f"{', '.join(left_out[:3]) or 'anything else'}; wanted the linears of model.language_model, and "
            f"{', '.join(NOT_QUANTIZED)} in 16 or 32 bits."
            + (" Take the unquantised checkpoint and quantization='nf4'." if is_stored else "")
        )
    for module in quantized.values():
        # A fast path of avx512_bf16: after a forward in eval mode, it trains without gradients.
        module.support_avx512bf16_for_cpu = False


def set_nf4_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Compute the 4-bit linears in a dtype; on a CPU always in float32, which is the fastest there."""
    for module in linear4bits(model).values():
        module.compute_dtype = dtype if torch.cuda.is_available() else torch.float32
        module.compute_type_is_set = True  # or the first input would decide


def dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its 4-bit weights as the plain ones that they stand for, in place."""
    quantized = linear4bits(model)
    if not quantized:
        return model
    for module in quantized.values():
        module.weight.quant_state.dtype = torch.float32  # rounded once, to what is asked for
    model = model.dequantize(dtype=dtype)
    model.is_loaded_in_4bit = False  # PEFT asks; the library leaves it
    # What the library did to read stored 4-bit weights it would undo in writing, and cannot.
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [one for one in conversions if not getattr(one, "operations", None)]
    return model


def linear4bits(model: torch.nn.Module) -> dict[str, Any]:
    """The 4-bit linears of a model by name."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def _require_bitsandbytes(what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{what} and bitsandbytes is not installed; wanted it: pip install 'llavamed-peft[quantization]'."
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

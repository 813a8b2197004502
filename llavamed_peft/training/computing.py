"""How a stage is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers.integrations import get_available_reporting_integrations

from ..errors import ConfigError
from ..features.forecast import Asked
from ..modeling.load import resolve_dtype
from ..modeling.quantization import Quantization
from ..modeling.sharding import Sharding, asked_sharding
from ..packing.collator import LAYOUTS
from ..packing.masks import MAX_ROW_TOKENS

MAX_GRAD_NORM = 1.0  # the Hugging Face trainer's default, with which LLaVA and LLaVA-Med were trained


@dataclass(frozen=True, slots=True)
class Computing:
    """How a stage is computed: what is learnt depends on `dtype`, and on the rest up to rounding and
    dropout's random numbers.

    Args:
        dtype: of the frozen weights and of autocast; trainable tensors are fp32.
        layout: of a device batch, see `PackedCollator`.
        max_row_tokens: bound of a device batch's tokens, rows × longest.
        gradient_checkpointing: recompute activations in the backward pass.
        workers: processes that decode images ahead, at most; 0 decodes in the training process.
        eval_steps: optimizer steps between two held-out losses; `None`: a tenth of the stage's.
        save_steps: optimizer steps between two checkpoints; `None`: a tenth of the stage's.
        report_to: `"none"`, or trackers that the trainer knows, such as `"tensorboard"` or `"trackio"`.
        sharding: how the model is spread over processes; `None`: each has all of it.
        full_dtype: `"float32"`: a full stage is written as it was trained; `"stored"`: rounded to the dtype
            in which the base is stored, before the last held-out loss.
        feature_cache: store what the frozen vision tower makes of each image: always, never, or where it
            pays; never of a sharded model.
    """

    dtype: torch.dtype
    layout: str
    max_row_tokens: int
    gradient_checkpointing: bool
    workers: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    report_to: str | list[str] = "none"
    sharding: Sharding | None = None
    feature_cache: Asked = "auto"
    full_dtype: str = "float32"


def choose_computing(
    *,
    dtype: str | torch.dtype | None,
    layout: str,
    max_row_tokens: int | None,
    gradient_checkpointing: bool | None,
    workers: int | None,
    eval_steps: int | None,
    save_steps: int | None,
    report_to: str | list[str],
    quantization: Quantization,
    feature_cache: Asked,
    full_dtype: str,
) -> Computing:
    """How a stage is computed, from the call's keywords, the launcher's variables and the device.

    Raises:
        ConfigError: a keyword that cannot be had, or that does not fit the launch configuration or the
            device.
    """
    on_gpu = torch.cuda.is_available()
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; wanted one process per GPU "
            f"(torchrun --nproc_per_node {torch.cuda.device_count()} script.py), or one visible GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    _check_number("max_row_tokens", max_row_tokens, 1)
    _check_number("workers", workers, 0)
    _check_number("eval_steps", eval_steps, 1)
    _check_number("save_steps", save_steps, 1)
    if gradient_checkpointing is not None and not isinstance(gradient_checkpointing, bool):
        raise ConfigError(
            f"gradient_checkpointing is {gradient_checkpointing!r}; wanted None, True or False."
        )
    _check_trackers(report_to)
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; wanted one of {', '.join(LAYOUTS)}.")
    compute_dtype = _compute_dtype(dtype, on_gpu)
    sharding = asked_sharding(compute_dtype, MAX_GRAD_NORM)
    if sharding is not None and quantization is not None:
        raise ConfigError(
            f"quantization is {quantization!r} and the launch configuration shards ({sharding.method}); "
            "wanted one of the two: 4-bit weights cannot be cut. Launch without FSDP and DeepSpeed: each GPU "
            "then holds all of the small model."
        )
    _check_feature_cache(feature_cache, sharding)
    if full_dtype not in ("float32", "stored"):
        raise ConfigError(f"full_dtype is {full_dtype!r}; wanted 'float32' or 'stored'.")
    if full_dtype == "stored" and sharding is not None and sharding.deepspeed is not None:
        raise ConfigError(
            "full_dtype is 'stored' and the launch configuration is DeepSpeed's, which keeps the trained "
            "weights to itself; wanted 'float32' with it. Write 16 bits afterwards with llavamed-peft merge "
            "--dtype."
        )
    checkpoints = on_gpu or (sharding is not None and sharding.gradient_checkpointing)
    return Computing(
        dtype=compute_dtype,
        layout=layout,
        max_row_tokens=max_row_tokens or MAX_ROW_TOKENS["cuda" if on_gpu else "cpu"],
        gradient_checkpointing=checkpoints if gradient_checkpointing is None else gradient_checkpointing,
        workers=(_decoders() if on_gpu else 0) if workers is None else workers,
        eval_steps=eval_steps,
        save_steps=save_steps,
        report_to=report_to or "none",
        sharding=sharding,
        feature_cache=feature_cache,
        full_dtype=full_dtype,
    )


def _check_number(name: str, number: int | None, least: int) -> None:
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < least):
        raise ConfigError(f"{name} is {number!r}; wanted None or a whole number of at least {least}.")


def _check_trackers(report_to: str | list[str]) -> None:
    trackers = [report_to] if isinstance(report_to, str) else [] if report_to is None else report_to
    if not isinstance(trackers, list):
        raise ConfigError(
            f"report_to is {report_to!r}; wanted the name of a tracker, such as 'tensorboard', or a list of "
            "them."
        )
    for tracker in trackers:
        available = ["none", *get_available_reporting_integrations()]
        if tracker not in available:
            raise ConfigError(f"report_to names {tracker!r}; installed here: {', '.join(available)}.")


def _compute_dtype(dtype: str | torch.dtype | None, on_gpu: bool) -> torch.dtype:
    chosen = resolve_dtype(dtype) or (torch.bfloat16 if on_gpu else torch.float32)
    if chosen not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"dtype is {dtype!r}; training computes in 'bfloat16' or 'float32' (float16 would need loss "
            "scaling)."
        )
    if chosen == torch.bfloat16 and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"{torch.cuda.get_device_name()} has no bfloat16; wanted dtype='float32' on it.")
    return chosen


def _check_feature_cache(feature_cache: Asked, sharding: Sharding | None) -> None:
    if feature_cache != "auto" and not isinstance(feature_cache, bool):
        raise ConfigError(f"feature_cache is {feature_cache!r}; wanted 'auto', True or False.")
    if feature_cache is True and sharding is not None:
        raise ConfigError(
            f"feature_cache is True and the launch configuration shards ({sharding.method}); wanted 'auto' "
            "or False with it: the processes gather the vision tower's layers together, so none can look at "
            "images of its own. Launch without FSDP and DeepSpeed to store features."
        )


def _decoders() -> int:
    """Processes that decode images for one training process: its share of the cores that may be used, at most
    8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

"""What a call of `curriculum_finetune` must fulfil before anything is read or made, and how it will be computed.

Each function looks at arguments alone (and at what `start_from` says of itself) and raises `ConfigError` or `AdapterError` with
what came, what was wanted and what to do. What data, checkpoint and folder must fulfil is said where they are opened.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations

from .adapters import StageAdapter
from .datasets.sources import Data
from .errors import AdapterError, ConfigError
from .feature_cache import Asked
from .modeling.load import Quantization, check_quantization, resolve_dtype
from .modeling.parts import NO_TARGET
from .modeling.sharding import asked_sharding
from .packing.collator import LAYOUTS
from .packing.masks import MAX_ROW_TOKENS
from .stages import Curriculum, LoraSpec
from .training import MAX_GRAD_NORM, Computing


def carried_lora(parent: StageAdapter | None) -> LoraSpec | None:
    """The LoRA that a projector stage carries, frozen and without dropout, from the stage before it."""
    config = None if parent is None else parent.peft_config()
    if config is None or config.target_modules == NO_TARGET or config.target_modules == {NO_TARGET}:
        return None
    return LoraSpec(rank=config.r, alpha=config.lora_alpha, dropout=0.0)


def check_names(curriculum: Curriculum, data: Mapping[str, Data], eval_data: Mapping[str, Data], image_folder: Any) -> None:
    """Every stage has data, and nothing is given for a stage that the curriculum does not have."""
    if not isinstance(curriculum, Curriculum):
        raise ConfigError(f"curriculum is {curriculum!r}; wanted a Curriculum, such as Curriculum(stages=(...,)).")
    per_stage = {"data": data, "eval_data": eval_data}
    if isinstance(image_folder, Mapping):
        per_stage["image_folder"] = image_folder
    for argument, given in per_stage.items():
        if not isinstance(given, Mapping):
            raise ConfigError(f"{argument} is {given!r}; wanted a dictionary of stage name → data.")
        if nothing := [name for name in given if given[name] is None]:
            raise ConfigError(f"{argument}[{nothing[0]!r}] is None; wanted data, or no such entry.")
        curriculum.check_keys(argument, given)
    names = [stage.name for stage in curriculum.stages]
    missing = [name for name in names if name not in data]
    if missing:
        raise ConfigError(
            f"data has nothing for stage {missing[0]!r}; wanted an entry for each of {', '.join(names)}. To train fewer "
            f"stages, give a curriculum without {missing[0]!r}."
        )


def check_files(output_dir: str | Path, data: Sequence[Data], own_names: Collection[str]) -> None:
    """A folder to write to is named, and no data file may stand where the run writes its own."""
    if not isinstance(output_dir, (str, os.PathLike)) or output_dir == "":
        raise ConfigError(f"output_dir is {output_dir!r}; wanted a folder to write to ('.' is the current one).")
    several = [[given] if isinstance(given, (str, Path)) else given for given in data]
    files = [file for given in several if isinstance(given, (list, tuple)) for file in given if isinstance(file, (str, Path))]
    for file in map(Path, files):
        if file.name in own_names and file.parent.resolve() == Path(output_dir).resolve():
            raise ConfigError(f"data names {file}, which the run writes itself; wanted the data outside output_dir.")


def check_lineage(curriculum: Curriculum, parent: StageAdapter | None, quantization: Quantization) -> None:
    """The stages can be trained so, and continue what `start_from` left."""
    check_quantization(quantization)
    for stage in curriculum.stages:
        if stage.trains == "full" and quantization is not None:
            raise ConfigError(
                f"Stage {stage.name!r} trains 'full' and quantization is {quantization!r}; wanted None, since 4-bit weights "
                "cannot be trained. Use trains='lora'."
            )
    if parent is not None and parent.record["image_aspect_ratio"] != curriculum.image_aspect_ratio:
        raise ConfigError(
            f"Curriculum.image_aspect_ratio is {curriculum.image_aspect_ratio!r}, start_from was trained with "
            f"{parent.record['image_aspect_ratio']!r}; wanted the same, since its processor is carried on."
        )
    carried = None if parent is None or parent.is_checkpoint else carried_lora(parent)
    for stage in curriculum.stages:
        if stage.trains == "full":
            return
        if carried and stage.lora and (stage.lora.rank, stage.lora.alpha) != (carried.rank, carried.alpha):
            raise ConfigError(
                f"Stage {stage.name!r} has LoRA rank {stage.lora.rank} and alpha {stage.lora.alpha:g}, start_from rank "
                f"{carried.rank} and alpha {carried.alpha:g}; wanted equal numbers, since the stage continues its tensors."
            )


def check_architecture(base: Mapping[str, Any], parent: StageAdapter) -> None:
    """`start_from` was trained on a base of this architecture."""
    for part in ("model_type", "language_model", "vision_tower"):
        if base[part] != parent.record["base"][part]:
            raise AdapterError(
                f"start_from ({parent.path.name}) was trained on {part} {parent.record['base'][part]!r}, the base's is "
                f"{base[part]!r}; wanted the same architecture."
            )


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
) -> Computing:
    """How a stage is computed, from the call's keywords, the launcher's variables and the device."""
    on_gpu = torch.cuda.is_available()
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; wanted one process per GPU (torchrun --nproc_per_node "
            f"{torch.cuda.device_count()} script.py), or one visible GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    steps = [("eval_steps", eval_steps, 1), ("save_steps", save_steps, 1)]
    for name, number, least in (("max_row_tokens", max_row_tokens, 1), ("workers", workers, 0), *steps):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < least):
            raise ConfigError(f"{name} is {number!r}; wanted None or a whole number of at least {least}.")
    if gradient_checkpointing is not None and not isinstance(gradient_checkpointing, bool):
        raise ConfigError(f"gradient_checkpointing is {gradient_checkpointing!r}; wanted None, True or False.")
    trackers = [report_to] if isinstance(report_to, str) else [] if report_to is None else report_to
    if not isinstance(trackers, list):
        raise ConfigError(f"report_to is {report_to!r}; wanted the name of a tracker, such as 'tensorboard', or a list of them.")
    for tracker in trackers:
        available = ["none", *get_available_reporting_integrations()]
        if tracker not in available:
            raise ConfigError(f"report_to names {tracker!r}; installed here: {', '.join(available)}.")
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; wanted one of {', '.join(LAYOUTS)}.")
    compute_dtype = resolve_dtype(dtype) or (torch.bfloat16 if on_gpu else torch.float32)
    if compute_dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"dtype is {dtype!r}; training computes in 'bfloat16' or 'float32' (float16 would need loss scaling).")
    if compute_dtype == torch.bfloat16 and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"{torch.cuda.get_device_name()} has no bfloat16; wanted dtype='float32' on it.")
    sharding = asked_sharding(compute_dtype, MAX_GRAD_NORM)
    if sharding is not None and quantization is not None:
        raise ConfigError(
            f"quantization is {quantization!r} and the launch configuration shards ({sharding.method}); wanted one of the two: "
            "4-bit weights cannot be cut. Launch without FSDP and DeepSpeed: each GPU then holds the small model whole."
        )
    if feature_cache != "auto" and not isinstance(feature_cache, bool):
        raise ConfigError(f"feature_cache is {feature_cache!r}; wanted 'auto', True or False.")
    if feature_cache is True and sharding is not None:
        raise ConfigError(
            f"feature_cache is True and the launch configuration shards ({sharding.method}); wanted 'auto' or False with it: the "
            "processes gather the vision tower's layers together, so none can look at images of its own. Launch without FSDP and "
            "DeepSpeed to store features."
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
    )


def _decoders() -> int:
    """Processes that decode images for one training process: its share of the cores that may be used, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

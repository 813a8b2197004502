"""What a call of `curriculum_finetune` must fulfil before anything is read or made, and how it will be
computed.

Each function looks at arguments alone (and at what `start_from` says of itself) and raises `ConfigError` or
`AdapterError` with what came, what was wanted and what to do. What data, checkpoint and folder must fulfil is
said where they are opened.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from ..adapters.record import Base
from ..adapters.stage_adapter import StageAdapter, check_fits, warn_of_unquantized
from ..datasets.sources import Data
from ..errors import AdapterError, CheckpointError, ConfigError
from ..modeling.load import empty_model
from ..modeling.processor import load_processor
from ..modeling.quantization import Quantization
from ..stages import Curriculum
from .lineage import carried_lora

# What is put around a stage's name at most: ".<stage>-train.partial"
LONGEST_SUFFIX = len(".-train.partial")


def check_names(
    curriculum: Curriculum, data: Mapping[str, Data], eval_data: Mapping[str, Data], image_folder: Any
) -> None:
    """Every stage has data, and nothing is given for a stage that the curriculum does not have."""
    if not isinstance(curriculum, Curriculum):
        raise ConfigError(
            f"curriculum is {curriculum!r}; wanted a Curriculum, such as Curriculum(stages=(...,))."
        )
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
            f"data has nothing for stage {missing[0]!r}; wanted an entry for each of {', '.join(names)}. To "
            f"train fewer stages, give a curriculum without {missing[0]!r}."
        )


def check_files(output_dir: str | Path, data: Sequence[Data], own_names: Collection[str]) -> None:
    """A folder to write to is named, and no data file may be where the run writes its own."""
    if not isinstance(output_dir, (str, os.PathLike)) or output_dir == "":
        raise ConfigError(
            f"output_dir is {output_dir!r}; wanted a folder to write to ('.' is the current one)."
        )
    several = [[given] if isinstance(given, (str, Path)) else given for given in data]
    files = [
        file
        for given in several
        if isinstance(given, (list, tuple))
        for file in given
        if isinstance(file, (str, Path))
    ]
    for file in map(Path, files):
        if file.name in own_names and file.parent.resolve() == Path(output_dir).resolve():
            raise ConfigError(
                f"data names {file}, which the run writes itself; wanted the data outside output_dir."
            )


def check_names_fit(output_dir: Path, stages: Sequence[str]) -> None:
    """The disk can hold every file that is named after a stage."""
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        most = os.pathconf(there, "PC_NAME_MAX") - LONGEST_SUFFIX
    except (OSError, ValueError):  # the file system does not say
        return
    for name in stages:
        if len(os.fsencode(name)) > most:
            raise ConfigError(
                f"Stage.name is {name!r}, {len(os.fsencode(name))} bytes, and {output_dir} holds names of at "
                f"most {most} (and what is appended to them); wanted a shorter one."
            )


def check_share(argument: str, share: float) -> None:
    """A number between 0 and 1."""
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigError(f"{argument} is {share!r}; wanted a share between 0 and 1.")


def check_scopes(curriculum: Curriculum, quantization: Quantization, stored: Quantization) -> None:
    """No stage trains weights that are in 4 bits.

    Args:
        quantization: asked for.
        stored: of the base itself.
    """
    for stage in curriculum.stages:
        if stage.trains == "full" and (quantization or stored) is not None:
            came, wanted = (
                (f"quantization is {quantization!r}", "None")
                if stored is None
                else (f"the base is stored in {stored.upper()}", "the unquantised checkpoint")
            )
            raise ConfigError(
                f"Stage {stage.name!r} trains 'full' and {came}; wanted {wanted}, since 4-bit weights cannot "
                "be trained. Use trains='lora'."
            )


def check_lineage(curriculum: Curriculum, parent: StageAdapter | None) -> None:
    """The stages can continue what `start_from` left."""
    if parent is not None and parent.record.image_aspect_ratio != curriculum.image_aspect_ratio:
        raise ConfigError(
            f"Curriculum.image_aspect_ratio is {curriculum.image_aspect_ratio!r}, start_from was trained "
            f"with {parent.record.image_aspect_ratio!r}; wanted the same, since its processor is "
            "reused."
        )
    carried = None if parent is None or parent.is_checkpoint else carried_lora(parent)
    for stage in curriculum.stages:
        if stage.trains == "full":
            return
        if carried and stage.lora and (stage.lora.rank, stage.lora.alpha) != (carried.rank, carried.alpha):
            raise ConfigError(
                f"Stage {stage.name!r} has LoRA rank {stage.lora.rank} and alpha {stage.lora.alpha:g}, "
                f"start_from rank {carried.rank} and alpha {carried.alpha:g}; wanted equal numbers, since "
                "the stage continues its tensors."
            )


def check_base(
    base: Base, config: PreTrainedConfig, parent: StageAdapter, quantization: Quantization
) -> None:
    """`start_from` belongs to this base.

    Args:
        base: of the call's `model`.
        config: of the checkpoint that the first stage begins with.
        quantization: of the run.

    Raises:
        AdapterError: it has another architecture, other shapes, or is a full checkpoint of another base.

    Warns:
        UserWarning: it was trained over NF4, and the run is not.
    """
    for part in ("model_type", "language_model", "vision_tower"):
        if getattr(base, part) != getattr(parent.record.base, part):
            raise AdapterError(
                f"start_from ({parent.path.name}) was trained on {part} "
                f"{getattr(parent.record.base, part)!r}, the base's is {getattr(base, part)!r}; wanted the "
                "same architecture."
            )
    if not parent.is_checkpoint:
        check_fits(empty_model(config), parent)
        warn_of_unquantized(parent, quantization)
        return
    itself = replace(base, sha256=parent.record.sha256)
    origins = [origin for origin in (parent.record.root, parent.record.base) if origin is not None]
    differences = [base.difference(origin) for origin in (itself, *origins)]
    if all(differences):
        raise AdapterError(
            f"start_from ({parent.path.name}) is a full checkpoint, and model another one: {differences[1]}. "
            f"Wanted model={origins[0].public_name}, which it was trained from, or its own folder: training "
            "begins with its weights."
        )


def parent_processor(parent: StageAdapter, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of `start_from`, which the run continues to use.

    Raises:
        AdapterError: it is not one of this base; image size, image token or tokenizer differ.
    """
    try:
        return load_processor(parent.path, config)
    except CheckpointError as error:
        raise AdapterError(
            f"start_from ({parent.path.name}) does not fit the base, which is not the one it was trained on: "
            f"{error}"
        ) from error

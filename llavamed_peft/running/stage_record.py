"""What is recorded of a stage that was trained, for its `stage.json`."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ..adapters.record import DataFile, StageRecord
from ..batches.ledger import Ledger
from ..modeling.quantization import Quantization
from ..stages import Curriculum, Stage
from ..training.computing import Computing
from ..version import __version__
from .lineage import Lineage, parent_of

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "safetensors")


def stage_record(
    stage: Stage,
    lineage: Lineage,
    train: Ledger,
    held_out: Ledger | None,
    metrics: dict[str, Any],
    *,
    curriculum: Curriculum,
    computing: Computing,
    quantization: Quantization,
    processes: int,
    stop_tokens: dict[str, int],
    **files: Any,
) -> StageRecord:
    """The record of a stage that has just been trained.

    Args:
        stage: as it was trained.
        lineage: where it began.
        train, held_out: the ledgers of its data.
        metrics: from its training.
        curriculum, computing, quantization, processes: how the run was called and computed.
        stop_tokens: what ends an answer.
        files: what is known once the stage's files are written: `kind`, `sha256` and `config_sha256`.
    """
    sharding = computing.sharding
    on_gpu = torch.cuda.is_available()
    return StageRecord(
        stage=stage,
        image_aspect_ratio=curriculum.image_aspect_ratio,
        seed=curriculum.seed,
        base=lineage.identity,
        root=lineage.root,
        parent=parent_of(lineage),
        data=_files(train),
        eval_data=() if held_out is None else _files(held_out),
        metrics=metrics,
        computing={
            **asdict(computing),
            "dtype": str(computing.dtype).removeprefix("torch."),
            "sharding": None if sharding is None else sharding.method,
            "quantization": quantization,
        },
        device=torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        processes=processes,
        versions=_versions(),
        stop_tokens=stop_tokens,
        finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        **files,
    )


def _files(ledger: Ledger) -> tuple[DataFile, ...]:
    return tuple(DataFile(**account) for account in ledger.account())


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"llavamed-peft": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions

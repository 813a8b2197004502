"""Rows, device batches and data loaders for tests of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from PIL import Image

from llavamed_peft import Conversation, Curriculum, Schedule, Stage, Turn
from llavamed_peft.batches.checking import build_index
from llavamed_peft.batches.decoding import DeviceBatches, DeviceInputs
from llavamed_peft.batches.loader import StepLoader
from llavamed_peft.batches.steps import StepSampler
from llavamed_peft.batches.workers import WorkerNotes
from llavamed_peft.datasets.rejects import RejectLog
from llavamed_peft.datasets.sources import open_sources
from llavamed_peft.modeling.load import read_config
from llavamed_peft.modeling.processor import load_processor, make_stage_processor
from llavamed_peft.packing import PackedCollator

# The second with a processor class of our own
KINDS = {
    "llava": (),
    "llava_onevision": ("qwen2", "siglip", -1),
}

ONE_STAGE = Curriculum((Stage("vqa", "projector", Schedule(epochs=1, learning_rate=1e-3, global_batch=2)),))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture
def rows(tmp_path: Path) -> list[Conversation]:
    """Eight, each about an image of its own."""
    turns = (Turn("user", "<image>\nwhat is this?"), Turn("assistant", "a heart"))
    for i in range(8):
        Image.new("RGB", (40 + 10 * i, 60), (30 * i, 90, 20)).save(tmp_path / f"{i}.png")
    return [Conversation(f"id-{i}", turns, (str(tmp_path / f"{i}.png"),)) for i in range(8)]


def batches_of(
    base: Path, rows: list[Conversation], folder: Path, notes: WorkerNotes | None
) -> DeviceBatches:
    collate = PackedCollator(
        make_stage_processor(load_processor(base, read_config(base)), "pad"), max_row_tokens=4096
    )
    with RejectLog(folder / "rejected.jsonl") as rejects:
        index = build_index(open_sources(rows, None, "data"), collate, folder / "index.arrow", rejects, 0.0)
    return DeviceBatches(index, collate, notes)


def loader_of(batches: DeviceBatches, start: str | None, timeout: float = 0) -> StepLoader:
    sampler = StepSampler(
        batches.index.column("length"),
        batches.index.column("group"),
        ONE_STAGE.stages[0].schedule,
        max_row_tokens=4096,
        seed=0,
    )
    workers = 0 if start is None else 2
    return StepLoader(
        batches,
        batch_sampler=sampler,
        collate_fn=as_is,
        num_workers=workers,
        multiprocessing_context=start,
        timeout=timeout,
    )


def as_is(batches: list[DeviceInputs]) -> list[DeviceInputs]:
    return batches

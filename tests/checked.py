"""Data with every kind of row, checked into an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from llavamed_peft.batches.checking import build_index
from llavamed_peft.batches.index import Index
from llavamed_peft.batches.ledger import Ledger
from llavamed_peft.datasets.rejects import RejectLog
from llavamed_peft.datasets.sources import open_sources
from llavamed_peft.modeling.load import read_config
from llavamed_peft.modeling.processor import load_processor, make_stage_processor
from llavamed_peft.packing import PackedCollator

KINDS = {"llava": (), "vipllava": (), "llava_next": ("mistral",), "llava_onevision": ("qwen2", "siglip", -1)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


def account(index: Index) -> list[dict[str, object]]:
    return Ledger(index, "training", max_rejected=1.0).account()


def collator_of(base: Path, max_length: int = 2048, ratio: str = "pad") -> PackedCollator:
    return PackedCollator(make_stage_processor(load_processor(base, read_config(base)), ratio), max_length)


def row(number: int, image: str, *said: str) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": f"id-{number}", "image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven rows: 2 and 6 are rejected by the reader, 3 and 5 by the index."""
    for name, colour in {"a": "white", "b": "white", "c": "black"}.items():
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        row(1, "a.png", "<image>\nwhat is this?", "a heart"),
        row(2, "missing.png", "<image>\nwhat is this?", "a lung"),
        row(3, "broken.png", "<image>\nwhat is this?", "a lung"),
        row(4, "a.png", "<image>\nis it normal?", "yes", "and the left?", "no"),
        row(5, "b.png", "<image>\nwhat is this?", "a </s> heart"),
        row(6, "b.png", "<image>\nwhat is this?", ""),
        row(7, "c.png", "what is <image> ?", "an x-ray"),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "data.jsonl"


def build(
    sources: Any, collator: PackedCollator, folder: Path, max_rejected: float | None = 0.9, show: Any = None
) -> tuple[Index, list[dict[str, object]]]:
    """The index in a folder, and what was logged as rejected."""
    log = folder / "rejected.jsonl"
    with RejectLog(log) as rejects:
        found = build_index(
            open_sources(sources, None, "data"), collator, folder / "index.arrow", rejects, max_rejected, show
        )
    return found, [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()
    ] if log.is_file() else []


def which(folder: Path) -> tuple[int, int]:
    """Tells one file from another that took its place."""
    stat = (folder / "index.arrow").stat()
    return stat.st_ino, stat.st_mtime_ns

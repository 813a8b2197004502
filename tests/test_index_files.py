"""Index files: kills, damage, progress, and the next call."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import account, bases, build, collator_of, data, row, which

from llavamed_peft import (
    Conversation,
    Curriculum,
    Schedule,
    Stage,
    StageAdapter,
    curriculum_finetune,
)
from llavamed_peft.batches import checking
from llavamed_peft.datasets.rejects import Reject, RejectLog
from llavamed_peft.datasets.sources import open_sources
from llavamed_peft.reporting import progress
from llavamed_peft.running.run import Run


def killed_in_the_middle(base: Path, data: Path, folder: Path) -> None:
    (source,) = open_sources(data, None, "data")

    def read(rejects: Any) -> Iterator[Conversation]:
        for number, conversation in enumerate(source.read(rejects)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield conversation

    checking._ROWS_PER_BATCH = 1
    build([replace(source, read=read)], collator_of(base), folder)


def test_a_kill_while_building_leaves_nothing_that_is_found(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=killed_in_the_middle, args=(bases["llava"], data, tmp_path)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("index.*")] == ["index.partial"]
    built, rejected = build(data, collator_of(bases["llava"]), tmp_path)
    assert len(built) == 3 and len(rejected) == 4
    assert {path.name for path in tmp_path.glob("index.*")} == {"index.arrow", "index.sha256"}


def flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


@pytest.mark.parametrize("damage", ["a token", "a header", "cut", "no arrow", "not finished", "of another"])
def test_a_damaged_index_is_built_anew(
    damage: str, bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    collator = collator_of(bases["llava"])
    built, rejected = build(data, collator, tmp_path)
    rows = built.rows.to_list()
    path, digest = tmp_path / "index.arrow", tmp_path / "index.sha256"
    whole = path.read_bytes()
    token_ids = np.asarray(rows[1]["token_ids"], np.int32).tobytes()
    damaged = {
        "a token": flipped(whole, whole.index(token_ids) + 4),
        "a header": flipped(whole, 4),
        "cut": whole[: len(whole) * 2 // 3],
        "no arrow": b"something else",
    }
    path.unlink()  # `built` is mapped from it
    path.write_bytes(damaged.get(damage, whole))
    if damage == "not finished":
        digest.unlink()
    elif damage == "of another":
        digest.write_text("0" * 64)
    first = which(tmp_path)
    with pytest.warns(
        UserWarning, match=r"index\.arrow: was damaged or not finished; its rows are checked again\."
    ):
        found, again = build(data, collator, tmp_path)
    assert (
        which(tmp_path) != first
        and found.rows.to_list() == rows
        and again == rejected
        and account(found) == account(built)
    )
    second = which(tmp_path)
    build(data, collator, tmp_path)
    assert which(tmp_path) == second


def test_rows_are_counted_across_batches_and_shown_as_they_are_checked(
    bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = collator_of(bases["llava"])
    whole, rejected = build(data, collator, tmp_path)
    monkeypatch.setattr(checking, "_ROWS_PER_BATCH", 2)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    shown: list[tuple[str, bool]] = []
    (tmp_path / "index.arrow").unlink()
    pieces, again = build(data, collator, tmp_path, show=lambda line, last: shown.append((line, last)))
    assert (
        pieces.rows.to_list() == whole.rows.to_list()
        and again == rejected
        and account(pieces) == account(whole)
    )
    assert [(line.partition(", ")[0], last) for line, last in shown] == [
        *((f"index      {rows} rows checked", False) for rows in (2, 4, 6, 7)),
        ("index      7 rows checked", True),
    ]
    shown.clear()
    build(data, collator, tmp_path, show=lambda line, last: shown.append((line, last)))
    ((line, last),) = shown
    assert (
        line.startswith("index      3 conversations, checked before")
        and "delete it if image files have changed" in line
        and last
    )


def test_a_log_that_is_kept_holds_each_row_once_and_counts_it_again(tmp_path: Path) -> None:
    rejects = [Reject("data.json", number, f"id {number}", "missing image", "gone") for number in (1, 2)]
    for _ in range(2):
        with RejectLog(tmp_path / "rejected.jsonl", keep=True) as log:
            for reject in [*rejects, rejects[0]]:
                log.append(reject)
            assert log.total == 3
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [reject.to_dict() for reject in rejects]


def test_a_run_begun_again_finds_its_indexes(
    bases: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    schedule = Schedule(epochs=1, learning_rate=1e-3, global_batch=2)
    curriculum = Curriculum((Stage("align", "projector", schedule), Stage("vqa", "projector", schedule)))
    call = {"data": {"align": data, "vqa": data}, "eval_data": {"vqa": data}, "output_dir": tmp_path / "run"}
    stage = Run.stage

    def stop_before_training(self: Run, *arguments: object) -> StageAdapter:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "stage", stop_before_training)
    with pytest.raises(KeyboardInterrupt):
        curriculum_finetune(bases["llava"], curriculum=curriculum, max_rejected=0.9, **call)
    built = {path.name: path.stat().st_ino for path in (tmp_path / "run" / "index").iterdir()}
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8")
    assert set(built) == {
        f"{name}.{kind}" for name in ("align-train", "vqa-train", "vqa-eval") for kind in ("arrow", "sha256")
    }
    assert [json.loads(line)["row"] for line in rejected.splitlines()] == [2, 3, 5, 6], (
        "of one file in three places, once"
    )

    monkeypatch.setattr(Run, "stage", stage)
    adapters = curriculum_finetune(bases["llava"], curriculum=curriculum, max_rejected=0.9, **call)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "run" / "index").iterdir()} == built
    assert (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8") == rejected
    for adapter in adapters.values():
        (entry,) = adapter.record.data
        assert (entry.rows, entry.used, sum(entry.rejected.values()), entry.failed) == (
            7,
            3,
            4,
            0,
        )
    assert "vqa-eval   3 conversations, checked before" in capsys.readouterr().err

"""Too little memory on a GPU, full disks, images that vanish: errors that lose nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from interrupted import (
    ROOT,
    STEPS,
    during,
    failed,
    kill_myself,
    killed,
    limit_file_size,
    lose_the_images,
    out,
    place,
    resume_and_compare,
    run_out_of_memory,
    said,
    steps_saved,
    undisturbed,
)

from llavamed_peft.errors import TrainingError
from llavamed_peft.features import filling, store
from llavamed_peft.running import run


def test_a_gpu_whose_memory_does_not_suffice_is_an_error_that_says_what_takes_less(
    place: Path, out: Path
) -> None:
    last = failed(place, out, during, "vqa", 5, True, run_out_of_memory)
    assert (
        "TrainingError: Stage 'vqa', after step 5 of 8: CUDA out of memory. Tried to allocate 2.00 GiB. Make "
        "the same" in last
    )
    assert (
        "with max_row_tokens=89 (now 100) or gradient_checkpointing=True; what is learnt stays the same. The "
        "check" in last
    )
    less = {"max_row_tokens": 89, "gradient_checkpointing": True}
    last = failed(place, out, during, "vqa", 8, False, run_out_of_memory, **less)
    assert (
        "after step 8 of 8: CUDA out of memory. Tried to allocate 2.00 GiB. The same call would meet this "
        "again; want" in last
    )
    assert (
        "a Schedule.max_length below the longest row's 89 tokens, a base in 4 bits (quantization='nf4'; not "
        "for f" in last
    )
    assert last.endswith("The checkpoint of step 8 is intact; make the same call again to resume from it.")
    kills.finish(kills.start(place, out, "lora", **less), out)


def fit_no_model() -> None:
    run.train_stage = lambda *how, **more: run_out_of_memory()


def test_a_model_that_does_not_fit_is_an_error(place: Path, out: Path) -> None:
    last = failed(place, out, fit_no_model)
    assert (
        "TrainingError: Stage 'align', before its first step: CUDA out of memory. Tried to allocate 2.00 "
        "GiB. The mod" in last
    )
    assert last.endswith("or a model spread over more GPUs (docs/scaling.md).")


def fit_one_file_of_features() -> None:
    store.IMAGES_PER_FILE = 2
    tower_features, seen = filling.tower_features, 0

    def watched(*how: object) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return tower_features(*how) if seen == 1 else run_out_of_memory()

    filling.tower_features = watched


def test_too_little_memory_to_store_features_is_an_error_and_complete_files_stay(
    place: Path, out: Path
) -> None:
    last = failed(place, out, fit_one_file_of_features, feature_cache=True)
    assert last.endswith(
        "TrainingError: Stage 'align', while features of its images were stored: CUDA out of memory. Tried "
        "to allocate 2.00 GiB. Make the same call with feature_cache=False or on an emptier GPU; what is "
        "learnt stays the same. Complete files of features stay. This stage has no checkpoint; make the same "
        "call again to start it again after the finished stages."
    )
    assert len(list((out / "features").rglob("*.safetensors"))) == 1
    kills.finish(kills.start(place, out, "lora", feature_cache=False), out)


def test_a_file_that_gets_too_large_is_an_error_and_nothing_is_half_written(place: Path, out: Path) -> None:
    last = failed(place, out, limit_file_size, 600_000)
    assert (
        "llavamed_peft.errors.TrainingError" in last and "checkpoints/vqa/step-2: cannot be written" in last
    )
    assert "File too large" in last and last.endswith(
        "This stage has no checkpoint; make the same call again to start it again after the finished stages."
    )
    assert not (out / "vqa").exists() and (out / "align").exists() and list(out.rglob(".*.partial")) == []
    resume_and_compare(place, out)


def test_a_stage_folder_that_cannot_be_written_leaves_the_last_checkpoint(place: Path, out: Path) -> None:
    last = failed(place, out, during, "vqa", STEPS["vqa"], False, limit_file_size, 100_000)
    assert "errors.TrainingError" in last and f"{out}/vqa: cannot be written" in last
    assert last.endswith("The checkpoint of step 8 is intact; make the same call again to resume from it.")
    assert not (out / "vqa").exists() and list(out.glob(".*.partial")) == []
    resume_and_compare(place, out)


def test_a_stage_whose_images_vanish_ends_and_resumes_once_they_are_back(place: Path, out: Path) -> None:
    whole, decoded = (out.with_name(f"{out.name}-whole"), {"feature_cache": False, "save_steps": 1})
    kills.finish(kills.start(place, whole, "lora", **decoded), whole)
    last = failed(place, out, during, "vqa", 3, True, lose_the_images, **decoded)
    assert re.search(
        r"data\.json: (9|10) of 14 rows cannot be used \(\S+%; max_rejected is 50\.0%\)\. Commonest: an",
        last,
    ), last
    assert f"Of the training data of stage 'vqa', met while it trained: {place}/" in last
    assert ".png: no such file; wanted an image. Each row is listed in rejected.jsonl." in last
    assert last.endswith("The checkpoint of step 4 is intact; make the same call again to resume from it.")
    reasons = [
        json.loads(line)["reason"]
        for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert reasons.count("failed while training vqa") in (8, 9)
    kills.finish(kills.start(place, out, "lora", **decoded), out)
    kills.check_same(whole, out)


def on_a_small_disk(place: Path, out: Path) -> None:
    """In a process that may mount, since what it mounts ends with it."""
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(out)], check=True)
    with pytest.raises(
        TrainingError,
        match=r"cannot be written .*No space left.* The checkpoint of step 2 is intact; make the same",
    ):
        kills.finetune(place, out, "lora")
    kills.check_whole(out)
    assert steps_saved(out, "vqa") == [2] and list(out.rglob(".*.partial")) == []
    (out / "filler").write_bytes(bytes(os.statvfs(out).f_bavail * os.statvfs(out).f_bsize))
    with pytest.raises(TrainingError, match=r"the disk refused .*No space left"):
        kills.finetune(place, out, "lora")
    (out / "filler").unlink()
    kills.check_whole(out)
    subprocess.run(["mount", "-o", "remount,size=50m", str(out)], check=True)
    kills.finetune(place, out, "lora")
    kills.check_same(place / "lora", out)


def test_a_full_disk_is_an_error_and_resumes_when_there_is_room(
    place: Path, out: Path, tmp_path: Path
) -> None:
    allowed = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if allowed.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {allowed.stderr!r}")
    script = (
        "import pathlib, sys, test_memory_and_disks; "
        "test_memory_and_disks.on_a_small_disk(*map(pathlib.Path, sys.argv[1:]))"
    )
    kills.context()  # sets what such a run is computed with
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script, str(place), str(out)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'benchmarks'}"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_made_is_an_error(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        TrainingError, match=r"file/run: cannot be written .*Not a directory.*; wanted a folder to write to"
    ):
        kills.finetune(place, tmp_path / "file" / "run", "lora")


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_taken(place: Path, out: Path) -> None:
    killed(place, out, during, "vqa", 5, True, kill_myself)
    assert steps_saved(out, "vqa") == [2, 4]
    file = out / "checkpoints" / "vqa" / "step-4" / "optimizer.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    resume_and_compare(place, out)
    told = (
        f"{file}: has {size - 100:,} bytes, was written with {size:,}. Removed, since damaged. The "
        "checkpoint of step 2 is intact"
    )
    assert said(out).count(told) == 1


def test_what_saving_costs_is_said_once_a_stage(
    undisturbed: dict[str, tuple[float, int]], place: Path
) -> None:
    lines = [line for line in said(place / "lora").splitlines() if "a checkpoint every" in line]
    assert [line.split()[0] for line in lines] == ["align", "vqa"]
    for line in lines:
        assert (
            "a checkpoint every 2 steps (save_steps) costs 0." in line
            and " % of the time, and " in line.replace("%", " %")
        )

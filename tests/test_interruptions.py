"""A run that is killed, stopped, or runs into a fault ends, by the same call, as if nothing had happened.

Calls are made by `benchmarks/kills.py` in processes of their own, forked from one that has imported everything; what shall
befall one of them is a function of this file, which runs in it first. The run is two stages with dropout, half an epoch,
held-out losses, several device batches a step, an image that breaks off and a row that cannot be used.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kills

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, StageAdapter
from llavamed_peft.batches.decoding import DeviceInputs
from llavamed_peft.batches.signals import StopSignals
from llavamed_peft.cli.launching import start as start_script
from llavamed_peft.errors import ConfigError, DataError, Interrupted, TrainingError
from llavamed_peft.features import filling, store
from llavamed_peft.packing import collator
from llavamed_peft.running import run
from llavamed_peft.running.folder import differences, locked
from llavamed_peft.training.checkpoints import (
    KEPT,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from llavamed_peft.training.trainer import StageTrainer

STEPS = {"align": 6, "vqa": 8}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    kills.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(place: Path) -> dict[str, tuple[float, int]]:
    """A run of each kind that was left alone, in `<place>/<kind>`: its seconds and file operations."""
    return {kind: kills.measure(place, kind) for kind in kills.KINDS}


@pytest.fixture
def out(place: Path, request: pytest.FixtureRequest, undisturbed: dict[str, tuple[float, int]]) -> Path:
    return place / request.node.name


# What befalls a call


def during(stage: str, steps: int, training: bool, then: Callable[..., object], *arguments: object) -> None:
    """Behind so many steps of a stage, in the first device batch of the next one or of the held-out loss, something happens."""
    compute, seen = StageTrainer._summed_loss, 0

    def watched(self: StageTrainer, model: torch.nn.Module, batch: object) -> torch.Tensor:
        nonlocal seen
        if self.stage.name == stage and self.state.global_step == steps and model.training == training:
            seen += 1
            if seen == 1:
                then(*arguments)
        return compute(self, model, batch)

    StageTrainer._summed_loss = watched


def signal_the_group(number: int) -> None:
    """As a terminal and Slurm do: every process of the call gets it, data-loader workers too."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, number)


def during_as_group(*how: object) -> None:
    os.setpgid(0, 0)
    during(*how)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_a_worker() -> None:
    multiprocessing.active_children()[0].kill()
    time.sleep(5)  # what torch raises when it learns of it ends this


def say_and_wait(marker: Path) -> None:
    marker.touch()
    time.sleep(300)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB"
    )


def lose_the_images() -> None:
    """Their disk goes away."""

    def lost(path: str) -> None:
        raise DataError(f"{path}: no such file; wanted an image.")

    collator.load_image = lost


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def spoil_images(stage: str, steps: int) -> None:
    """The step after these has image features that are not numbers."""
    compute = StageTrainer._summed_loss

    def spoiled(self: StageTrainer, model: torch.nn.Module, batch: DeviceInputs) -> torch.Tensor:
        if self.stage.name == stage and self.state.global_step == steps and model.training:
            inputs = {**batch.inputs, "tower_features": batch.inputs["tower_features"] * math.nan}
            batch = replace(batch, inputs=inputs)
        return compute(self, model, batch)

    StageTrainer._summed_loss = spoiled


def kill_before(event: str, name: str) -> None:
    """Die just before a file operation on something of that name."""

    def watch(happening: str, arguments: tuple[object, ...]) -> None:
        if (
            happening == event
            and isinstance(arguments[0], (str, os.PathLike))
            and Path(arguments[0]).name == name
        ):
            kill_myself()

    sys.addaudithook(watch)


# The ends of a call


def killed(place: Path, out: Path, before: Callable[..., object], *how: object, **changes: object) -> None:
    process = kills.start(place, out, "lora", before, *how, **changes)
    process.join(280)
    assert process.exitcode == -signal.SIGKILL, said(out)
    kills.check_whole(out)


def failed(
    place: Path, out: Path, before: Callable[..., object] | None = None, *how: object, **changes: object
) -> str:
    """The last line of a call that ended with an exception."""
    process = kills.start(place, out, "lora", before, *how, **changes)
    process.join(280)
    assert process.exitcode == 1, said(out)
    kills.check_whole(out)
    return said(out).rstrip().splitlines()[-1]


def goes_on(place: Path, out: Path, **changes: object) -> None:
    """The same call comes to its end, which is that of the run that was left alone."""
    kills.finish(kills.start(place, out, "lora", **changes), out)
    kills.check_same(place / "lora", out)


def said(out: Path) -> str:
    return Path(f"{out}.log").read_text(encoding="utf-8")


def steps_saved(out: Path, stage: str) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (out / "checkpoints" / stage).glob("step-*")
    )


# Kills


def test_an_undisturbed_run_is_whole(undisturbed: dict[str, tuple[float, int]], place: Path) -> None:
    for kind in kills.KINDS:
        for stage, steps in STEPS.items():
            assert StageAdapter.load(place / kind / stage).metrics["steps"] == steps
        assert not (place / kind / "checkpoints").exists()


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_change_nothing(
    seed: int, undisturbed: dict[str, tuple[float, int]], place: Path
) -> None:
    hit, _, _ = kills.kill_often(place, undisturbed, kills=5, seed=seed)
    assert hit.total() == 5


def test_kills_where_something_is_half_done_change_nothing(place: Path, out: Path) -> None:
    killed(place, out, kill_before, "os.rename", ".run.json.partial")
    assert not (out / "run.json").exists()
    killed(place, out, kill_before, "os.rename", ".step-4.partial")
    assert steps_saved(out, "align") == [2] and (out / "checkpoints" / "align" / ".step-4.partial").is_dir()
    killed(place, out, kill_before, "os.rename", ".align.partial")
    assert steps_saved(out, "align") == [4, 6] and (out / ".align.partial" / "stage.json").is_file()
    killed(place, out, kill_before, "os.rmdir", "step-4")
    assert not steps_saved(out, "align") and (out / "checkpoints" / ".align.partial").is_dir()
    killed(place, out, during, "vqa", 0, False, kill_myself)
    killed(place, out, during, "vqa", 3, False, kill_myself)
    killed(place, out, during, "vqa", 3, True, kill_myself)
    assert steps_saved(out, "vqa") == [2]
    killed(place, out, during, "vqa", 8, False, kill_myself)
    killed(place, out, kill_before, "os.rename", ".vqa.partial")
    goes_on(place, out)
    assert said(out).count("align      6/6") == 1, "a finished stage was trained again"


def test_a_finished_run_is_only_read(undisturbed: dict[str, tuple[float, int]], place: Path) -> None:
    def listing() -> list[tuple[str, int, int]]:
        return [
            (str(path), path.stat().st_mtime_ns, path.stat().st_size)
            for path in sorted((place / "lora").rglob("*"))
        ]

    before = listing()
    kills.finish(
        kills.start(place, place / "lora", "lora", eval_steps=3, save_steps=1, workers=1, max_row_tokens=99),
        place / "lora",
    )
    assert listing() == before


# Signals


def test_sigterm_and_ctrl_c_save_first_and_say_how_to_go_on(place: Path, out: Path) -> None:
    last = failed(place, out, during_as_group, "vqa", 3, False, signal_the_group, signal.SIGTERM, workers=2)
    assert last == (
        "llavamed_peft.errors.Interrupted: Stopped by SIGTERM after step 3 of 8 of stage 'vqa'. The "
        "checkpoint of step 3 is intact; make the same call again to resume from it."
    )
    assert "SIGTERM: saving, then stopping." in said(out) and "DataLoader worker" not in said(out)
    assert steps_saved(out, "vqa") == [2, 3]
    last = failed(place, out, during_as_group, "vqa", 5, True, signal_the_group, signal.SIGINT, workers=2)
    assert "Stopped by SIGINT after step 5 of 8" in last and steps_saved(out, "vqa") == [4, 5]
    last = failed(place, out, during_as_group, "vqa", 8, False, signal_the_group, signal.SIGINT, workers=2)
    assert "Stopped by SIGINT after step 8 of 8" in last
    goes_on(place, out)


def terminate_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_first_step_there_is_nothing_to_save(place: Path, out: Path) -> None:
    last = failed(place, out, during, "align", 0, True, terminate_myself)
    assert (
        "Stopped by SIGTERM after step 0 of 6 of stage 'align'. This stage has no checkpoint; make the same "
        "call" in last
    )
    goes_on(place, out)


class TestStopSignals:
    def test_the_first_is_noted_and_a_second_ctrl_c_stops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            signal, "getsignal", lambda number: signal.default_int_handler
        )  # pytest may run in the background
        handlers = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.received == signal.SIGINT
                signal.raise_signal(signal.SIGINT)  # of the same keystroke, through a launcher
                signal.raise_signal(signal.SIGTERM)
                time.sleep(1.1)
                signal.raise_signal(signal.SIGINT)
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
                signal.signal(number, handler)

    def test_what_nobody_obeyed_is_delivered_to_the_handler_from_before(self) -> None:
        heard: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        try:
            with StopSignals():
                signal.raise_signal(signal.SIGTERM)
                assert heard == []
            assert heard == [signal.SIGTERM]
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_an_ignored_signal_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGINT)
                assert stop.received is None
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_recipe_ends_with_the_customary_exit_code(
        self, number: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def main() -> None:
            raise Interrupted(number, "Stopped. Make the same call again to resume.")

        monkeypatch.setattr(sys, "argv", ["recipe.py"])
        with pytest.raises(SystemExit) as ended:
            start_script(main)
        assert (
            ended.value.code == code
            and capsys.readouterr().err == "Stopped. Make the same call again to resume.\n"
        )


# Two at once, and another run


def test_a_second_run_is_refused_and_a_call_right_after_a_kill_goes_on(place: Path, out: Path) -> None:
    marker = Path(f"{out}.marker")
    first = kills.start(place, out, "lora", during, "vqa", 3, True, say_and_wait, marker, workers=1)
    while not marker.exists():
        assert first.exitcode is None, said(out)
        time.sleep(0.05)
    with pytest.raises(TrainingError) as refused:
        kills.finetune(place, out, "lora")
    assert f"process {first.pid} on {os.uname().nodename} is at work in it; wanted one run at a time." in str(
        refused.value
    )
    assert first.exitcode is None
    first.kill()
    first.join()
    goes_on(place, out)


def test_a_lock_ends_with_its_context(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "run"):
            assert f"process {os.getpid()} on " in (tmp_path / "run" / "run.lock").read_text()


def test_another_curriculum_base_or_data_is_refused_field_by_field(
    undisturbed: dict[str, tuple[float, int]], place: Path, tmp_path: Path
) -> None:
    curriculum = Curriculum(
        (
            Stage("align", "projector", Schedule(epochs=2, learning_rate=2e-3, global_batch=4)),
            Stage("more", "lora", Schedule(epochs=2, learning_rate=1e-3), LoraSpec()),
        ),
        seed=7,
    )
    rows = json.loads((place / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(rows[:-1]))
    data = {"align": tmp_path / "data.json", "more": place / "data.json"}
    before = sorted(place.glob("lora/**/*"))
    with pytest.raises(ConfigError) as refused:
        kills.finetune(
            place, place / "lora", "lora", curriculum=curriculum, data=data, eval_data=None, dtype="bfloat16"
        )
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{place / 'lora'}: holds another run, which differs from this call in"
    assert lines[1:6] == [
        "  stages: align, vqa there, align, more now",
        '  dtype: "float32" there, "bfloat16" now',
        "  seed: 42 there, 7 now",
        "  stages.align.schedule.epochs: 1.5 there, 2 now",
        lines[5],
    ]
    assert lines[5].startswith("  data.align[1].sha256: ") and lines[5].count("…") == 2
    assert lines[6].startswith(
        "To resume it, make the same call as before. Otherwise choose another output_dir;"
    )
    assert sorted(place.glob("lora/**/*")) == before


def test_a_base_is_compared_as_far_as_both_sides_know_it() -> None:
    def run(**base: object) -> dict[str, object]:
        unknown = {"id": None, "revision": None, "name": "x", "sha256": None}
        return {"base": {**unknown, **base}, "stages": {}, "data": {}, "eval_data": {}}

    assert differences(run(sha256="a", name="moved"), run(sha256="a")) == []
    assert differences(run(id="org/x", revision="1"), run(id="org/x", revision="1", sha256="a")) == []
    assert differences(run(id="org/x", revision="1"), run(id="org/x", revision="2", sha256="a")) == [
        'base.revision: "1" there, "2" now'
    ]
    assert differences(run(sha256="a" * 64), run(sha256="b" * 64)) == [
        f"base.sha256: {'a' * 12}… there, {'b' * 12}… now"
    ]


def test_data_that_were_refused_can_be_mended_in_the_same_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "1 of 14 rows cannot be used" in failed(place, out, max_rejected=0.0)
    assert not (out / "run.json").exists()
    rows = json.loads((place / "data.json").read_text())
    (place / "mended.json").write_text(json.dumps(rows[:-2]))
    data = {"align": place / "mended.json", "vqa": place / "mended.json"}
    killed(
        place, out, kill_before, "os.rename", ".step-2.partial", max_rejected=0.0, data=data, eval_data=None
    )
    assert [entry["file"] for entry in json.loads((out / "run.json").read_text())["data"]["align"]] == [
        "mended.json"
    ]


# Faults


def test_a_worker_that_dies_is_an_error_and_the_checkpoint_stands(place: Path, out: Path) -> None:
    last = failed(place, out, during, "vqa", 3, True, kill_a_worker, workers=2)
    assert "llavamed_peft.errors.TrainingError: A worker that decodes images died" in last
    assert "is killed by signal: Killed." in last and "take fewer workers (now 2)" in last
    assert last.endswith("The checkpoint of step 2 is intact; make the same call again to resume from it.")
    goes_on(place, out)


def test_an_image_that_is_not_a_number_is_an_error_and_the_checkpoint_stands(place: Path, out: Path) -> None:
    last = failed(place, out, spoil_images, "vqa", 5)
    assert (
        "llavamed_peft.errors.TrainingError: The loss of step 6 is nan. Lower learning_rate, or look for odd "
        "data" in last
    )
    assert (
        "The checkpoint of step 4 is intact; make the same call again to resume from it. It would meet this "
        "again." in last
    )
    assert steps_saved(out, "vqa") == [2, 4] and not (out / "vqa").exists()
    goes_on(place, out)


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


def test_too_little_memory_to_store_features_is_an_error_and_whole_files_stay(place: Path, out: Path) -> None:
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
    goes_on(place, out)


def test_a_stage_folder_that_cannot_be_written_leaves_the_last_checkpoint(place: Path, out: Path) -> None:
    last = failed(place, out, during, "vqa", STEPS["vqa"], False, limit_file_size, 100_000)
    assert "errors.TrainingError" in last and f"{out}/vqa: cannot be written" in last
    assert last.endswith("The checkpoint of step 8 is intact; make the same call again to resume from it.")
    assert not (out / "vqa").exists() and list(out.glob(".*.partial")) == []
    goes_on(place, out)


def test_a_stage_whose_images_vanish_ends_and_goes_on_once_they_are_back(place: Path, out: Path) -> None:
    whole, decoded = (out.with_name(f"{out.name}-whole"), {"feature_cache": False, "save_steps": 1})
    kills.finish(kills.start(place, whole, "lora", **decoded), whole)
    last = failed(place, out, during, "vqa", 3, True, lose_the_images, **decoded)
    assert re.search(
        r"data\.json: (9|10) of 14 rows cannot be used \(\S+%; max_rejected is 50\.0%\)\. Commonest: an image",
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


def test_a_full_disk_is_an_error_and_goes_on_when_there_is_room(
    place: Path, out: Path, tmp_path: Path
) -> None:
    allowed = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if allowed.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {allowed.stderr!r}")
    script = "import pathlib, sys, test_interruptions; test_interruptions.on_a_small_disk(*map(pathlib.Path, sys.argv[1:]))"
    kills.context()  # sets what such a run is computed with
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", script, str(place), str(out)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
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
    goes_on(place, out)
    told = f"{file}: has {size - 100:,} bytes, was written with {size:,}. Removed, since damaged. The checkpoint of step 2 stands"
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


# Checkpoints


@pytest.fixture
def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}], lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_optimizer_state_finds_its_parameters_by_name(
    network: tuple[torch.nn.Module, torch.optim.Optimizer],
) -> None:
    model, optimizer = network
    tensors = optimizer_tensors(model, optimizer)
    assert set(tensors) == {
        f"{layer}.{part}/{entry}"
        for layer in "01"
        for part in ("weight", "bias")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    other = torch.optim.AdamW(
        [{"params": [parameter]} for parameter in reversed(list(model.parameters()))], lr=0.1
    )
    load_optimizer_tensors(model, other, tensors)
    assert other.state.keys() == optimizer.state.keys()
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[entry], other.state[parameter][entry]) for entry in state)
    with pytest.raises(
        TrainingError, match=r"holds optimizer state of 1 parameter\(s\) that do not train \(2.weight\)"
    ):
        load_optimizer_tensors(model, other, {"2.weight/exp_avg": torch.zeros(1)})


def test_random_numbers_go_on_where_they_stood() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.normal(), torch.randn(()).item()

    draw()
    state = json.loads(json.dumps(rng_state()))
    drawn = draw(), draw()
    set_rng_state(state)
    assert (draw(), draw()) == drawn


def test_two_checkpoints_are_kept_and_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        size = save_checkpoint(
            tmp_path, step, {"a": torch.ones(step)}, {"a/exp_avg": torch.zeros(2)}, {"history": [step]}
        )
    assert KEPT == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert size == sum(path.stat().st_size for path in (tmp_path / "step-11").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 11 and found.state == {"history": [11]}
    assert torch.equal(found.tensors()["a"], torch.ones(11)) and torch.equal(
        found.optimizer()["a/exp_avg"], torch.zeros(2)
    )
    state = tmp_path / "step-11" / "state.json"
    state.write_text(state.read_text().replace("11", "12"))
    with pytest.warns(
        UserWarning,
        match=r"state\.json: has another content than was written\. Removed, since damaged\. The ",
    ):
        assert newest_checkpoint(tmp_path).step == 10
    (tmp_path / "step-10" / "checkpoint.json").write_text("{")
    with pytest.warns(
        UserWarning, match=r"checkpoint\.json: cannot be read \(.*This stage has no checkpoint"
    ):
        assert newest_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []

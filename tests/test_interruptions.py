"""A run that is killed, stopped, or runs into a fault ends, by the same call, as if nothing had happened.

Calls are made by `benchmarks/kills.py` in processes of their own, forked from one that has imported
everything; what happens to one of them is a function of this file, which runs in it first. The run is two
stages with dropout, half an epoch, held-out losses, several device batches a step, an image that breaks off
and a row that cannot be used.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import kills
import pytest
from interrupted import (
    STEPS,
    during,
    during_as_group,
    failed,
    kill_a_worker,
    kill_before,
    kill_myself,
    killed,
    out,
    place,
    resume_and_compare,
    said,
    say_and_wait,
    signal_the_group,
    spoil_images,
    steps_saved,
    undisturbed,
)

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, StageAdapter
from llavamed_peft.batches.signals import StopSignals
from llavamed_peft.cli.launching import start as start_script
from llavamed_peft.errors import ConfigError, Interrupted, TrainingError
from llavamed_peft.running.folder import differences, locked

# Kills


def test_an_undisturbed_run_is_complete(undisturbed: dict[str, tuple[float, int]], place: Path) -> None:
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
    resume_and_compare(place, out)
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


def test_sigterm_and_ctrl_c_save_first_and_say_how_to_resume(place: Path, out: Path) -> None:
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
    resume_and_compare(place, out)


def terminate_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_the_first_step_there_is_nothing_to_save(place: Path, out: Path) -> None:
    last = failed(place, out, during, "align", 0, True, terminate_myself)
    assert (
        "Stopped by SIGTERM after step 0 of 6 of stage 'align'. This stage has no checkpoint; make the same "
        "call" in last
    )
    resume_and_compare(place, out)


class TestStopSignals:
    def test_the_first_is_noted_and_a_second_ctrl_c_stops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Pytest may run in the background
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
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


def test_a_second_run_is_refused_and_a_call_right_after_a_kill_resumes(place: Path, out: Path) -> None:
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
    resume_and_compare(place, out)


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


def test_data_that_were_refused_can_be_fixed_in_the_same_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "1 of 14 rows cannot be used" in failed(place, out, max_rejected=0.0)
    assert not (out / "run.json").exists()
    rows = json.loads((place / "data.json").read_text())
    (place / "fixed.json").write_text(json.dumps(rows[:-2]))
    data = {"align": place / "fixed.json", "vqa": place / "fixed.json"}
    killed(
        place, out, kill_before, "os.rename", ".step-2.partial", max_rejected=0.0, data=data, eval_data=None
    )
    assert [entry["file"] for entry in json.loads((out / "run.json").read_text())["data"]["align"]] == [
        "fixed.json"
    ]


# Faults


def test_a_worker_that_dies_is_an_error_and_the_checkpoint_is_intact(place: Path, out: Path) -> None:
    last = failed(place, out, during, "vqa", 3, True, kill_a_worker, workers=2)
    assert "llavamed_peft.errors.TrainingError: A worker that decodes images died" in last
    assert "is killed by signal: Killed." in last and "take fewer workers (now 2)" in last
    assert last.endswith("The checkpoint of step 2 is intact; make the same call again to resume from it.")
    resume_and_compare(place, out)


def test_an_image_that_is_not_a_number_is_an_error_and_the_checkpoint_is_intact(
    place: Path, out: Path
) -> None:
    last = failed(place, out, spoil_images, "vqa", 5)
    assert last == (
        "llavamed_peft.errors.TrainingError: The loss of step 6 is nan. The same call would meet this again: "
        "lower learning_rate or look for odd data, in another output_dir. Nothing of this stage was written "
        "under its name; its checkpoints and the stages before it are intact."
    )
    assert steps_saved(out, "vqa") == [2, 4] and not (out / "vqa").exists()
    resume_and_compare(place, out)

"""Data-loader workers that die or hang: the row they were at is named, however they were started. They really
die and hang.
"""

from __future__ import annotations

import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from decoded import KINDS, ONE_STAGE, bases, batches_of, loader_of, rows
from PIL import Image

from llavamed_peft import Conversation, Curriculum, Question, Schedule, Stage, curriculum_finetune
from llavamed_peft.batches import loader
from llavamed_peft.batches.decoding import DeviceBatches, DeviceInputs
from llavamed_peft.batches.workers import WorkerNotes
from llavamed_peft.errors import TrainingError
from llavamed_peft.packing import PackedCollator, collator
from llavamed_peft.training import trainer


class StuckAt5(PackedCollator):
    """Never comes back from one image, as from a file of a dead network mount."""

    def inputs(
        self, conversations: Sequence[object], on_image: Callable[[str], None] | None = None
    ) -> dict[str, torch.Tensor]:
        def stick(path: str) -> None:
            on_image(path)
            if path.endswith("5.png"):
                time.sleep(3600)

        return super().inputs(conversations, None if on_image is None else stick)


@pytest.fixture(scope="module", autouse=True)
def own_fork_server() -> Iterator[None]:
    """`benchmarks/kills.py` starts one with an environment of its own, in the same process of pytest."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_yield_the_same_batches(
    start: str, kind: str, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    batches = batches_of(bases[kind], rows, tmp_path, WorkerNotes(2))
    steps, alone = list(loader_of(batches, start)), list(loader_of(batches, None))
    assert len(steps) == len(alone) == 4
    for (batch,), (wanted,) in zip(steps, alone, strict=True):
        assert batch.inputs.keys() == wanted.inputs.keys()
        assert all(torch.equal(batch.inputs[name], wanted.inputs[name]) for name in wanted.inputs)
    assert batches.notes.read() == []


LATER_PROCESSES = """
import multiprocessing, signal
from multiprocessing import resource_tracker
from llavamed_peft.batches.loader import StepLoader

resource_tracker.ensure_running()  # as after the first shared memory
loader = StepLoader([0], batch_sampler=[[0]], num_workers=1, multiprocessing_context="forkserver")
assert [step.tolist() for step in loader] == [[0]]
with multiprocessing.get_context("forkserver").Pool(1) as pool:
    print(*pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ())))
"""


def test_processes_of_a_fork_server_that_workers_started_receive_signals() -> None:
    """It outlives the workers, and hands its mask on to all that follow."""
    done = subprocess.run([sys.executable, "-c", LATER_PROCESSES], capture_output=True, text=True, check=True)
    assert done.stdout == "\n", "a signal is blocked"


class SharesPixelsOnly(DeviceBatches):
    """Fails in the worker where pixels would be copied once more, or small tensors would each be an open
    file."""

    def __getitem__(self, rows: Sequence[int]) -> DeviceInputs:
        made = super().__getitem__(rows)
        assert torch.utils.data.get_worker_info() is not None and made.inputs["pixel_values"].is_shared()
        handed_over = pickle.dumps(made)
        assert made.inputs["input_ids"].numpy().tobytes() in handed_over, "token ids go through the pipe"
        return made


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_laid_down_in_shared_memory_at_once(
    kind: str, layout: str, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    batches = batches_of(bases[kind], rows, tmp_path, None)
    batches.collator.layout = layout
    steps = list(loader_of(SharesPixelsOnly(batches.index, batches.collator), "fork"))
    assert sum(batch.conversations for step in steps for batch in step) == len(rows)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_notes_of_a_worker_killed_from_outside_say_where_it_was(
    start: str, bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    batches = batches_of(bases["llava"], rows, tmp_path, WorkerNotes(2))
    batches.collator = StuckAt5(batches.collator.encoder.processor, max_row_tokens=4096)

    def kill_the_stuck_one() -> None:
        while not (
            stuck := [note for note in batches.notes.read() if "5.png" in note.text and note.seconds > 0.5]
        ):
            time.sleep(0.05)
        os.kill(stuck[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_stuck_one)
    killer.start()
    loader = iter(loader_of(batches, start))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        for _ in range(4):
            next(loader)
    killer.join()
    (note,) = [note for note in batches.notes.read() if note.is_dead]
    assert note.text.startswith(
        f"in memory:6 (id id-5), image {rows[5].images[0]}, in the device batch of in memory:"
    )


def test_training_names_the_row_that_killed_a_worker(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_image = collator.load_image

    def deadly(path: str) -> Image.Image:
        if path.endswith("3.png"):
            # As a decoder with a fault does; workers are forked here, so they have this too
            os.kill(os.getpid(), signal.SIGSEGV)
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", deadly)
    with pytest.raises(TrainingError) as raised:
        curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=ONE_STAGE, workers=2)
    said = str(raised.value)
    assert (
        f"A worker that decodes images died at in memory:4 (id id-3), image {tmp_path / '3.png'}, in the "
        "device batch of" in said
    )
    assert (
        "leave the row out if it is the cause; if memory ran out, take fewer workers" in said
        and "DataLoader worker" in said
    )
    assert not (tmp_path / "run" / "vqa").exists()


@pytest.mark.parametrize("held_out", [False, True])
def test_training_names_the_row_at_which_a_worker_hangs(
    held_out: bool,
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_image = collator.load_image

    def hangs(path: str) -> Image.Image:
        if path.endswith("6.png"):
            time.sleep(3600)
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", hangs)
    monkeypatch.setattr(loader, "HANGS_AFTER", 4.0)
    monkeypatch.setattr(loader, "LOOKS_EVERY", 0.5)
    question = [Question("asked", str(tmp_path / "6.png"), "what?", "a heart", "closed")]
    data, eval_data = ({"vqa": rows[:6]}, {"vqa": question}) if held_out else ({"vqa": rows}, None)
    with pytest.raises(TrainingError) as raised:
        curriculum_finetune(
            bases["llava"], data, tmp_path / "run", curriculum=ONE_STAGE, eval_data=eval_data, workers=1
        )
    row = "in memory:1 (id asked)" if held_out else "in memory:7 (id id-6)"
    assert (
        f"A worker that decodes images has been at {row}, image {tmp_path / '6.png'}, in the device batch of"
        in str(raised.value)
    )


@pytest.mark.parametrize("resumes", [False, True])
def test_a_step_slower_than_the_limit_of_one_image_is_waited_for(
    resumes: bool,
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a checkpoint too, where the trainer skips steps with a data loader of its own."""
    two_steps = Curriculum(
        (Stage("vqa", "projector", Schedule(epochs=1, learning_rate=1e-3, global_batch=4)),)
    )
    call = functools.partial(
        curriculum_finetune, bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=two_steps
    )
    step, load_image = trainer.StageTrainer.training_step, collator.load_image

    def one_step(self: trainer.StageTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 1:
            raise RuntimeError("the node was lost")
        return step(self, *arguments)

    def slow(path: str) -> Image.Image:
        time.sleep(1.6)
        return load_image(path)

    if resumes:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"^the node was lost$"):
            patch.setattr(trainer.StageTrainer, "training_step", one_step)
            call(save_steps=1)
    monkeypatch.setattr(collator, "load_image", slow)
    monkeypatch.setattr(loader, "HANGS_AFTER", 5.0)
    monkeypatch.setattr(loader, "LOOKS_EVERY", 0.2)
    metrics = call(workers=1)["vqa"].metrics
    assert metrics["steps"] == 2 and metrics["conversations"] == 8


def test_workers_get_on_while_one_writes_and_none_is_long_at_one_image() -> None:
    notes = WorkerNotes(2)

    class Written(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> int:
            notes.write(f"image {row}")
            if row == 1:
                notes.clear()
            return row

    assert not notes.get_on(within=1), "nobody has begun"
    list(
        torch.utils.data.DataLoader(Written(), num_workers=2, batch_size=None, multiprocessing_context="fork")
    )
    assert [note.text for note in notes.read()] == ["image 0"]
    assert notes.get_on(within=60)
    (at_image,) = notes.read()
    time.sleep(0.1)
    assert not notes.get_on(within=0.1) and notes.get_on(within=at_image.seconds + 60)


def test_a_signal_to_a_worker_that_is_not_yet_prepared_waits(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals every process of a job, also one that has just been started."""
    prepare = loader.prepare_worker

    def signalled_before(*how: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        prepare(*how)

    monkeypatch.setattr(loader, "prepare_worker", signalled_before)
    call = {"curriculum": ONE_STAGE, "workers": 1, "eval_data": {"vqa": rows[:2]}, "feature_cache": True}
    assert curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", **call)["vqa"].metrics[
        "conversations"
    ] == len(rows)


def test_a_worker_that_hangs_at_no_image_is_an_error_all_the_same(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceBatches, "__getitem__", lambda self, rows: time.sleep(3600))
    monkeypatch.setattr(loader, "HANGS_AFTER", 1.0)
    monkeypatch.setattr(loader, "LOOKS_EVERY", 0.2)
    with pytest.raises(
        TrainingError,
        match=r"A worker that decodes images hangs \(DataLoader timed out after 0.2 seconds\)\.",
    ):
        curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=ONE_STAGE, workers=1)


def test_another_error_in_training_is_left_as_it_is(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: trainer.StageTrainer, *arguments: object) -> None:
        raise RuntimeError("no memory on the device")

    monkeypatch.setattr(trainer.StageTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match=r"^no memory on the device$"):
        curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=ONE_STAGE, workers=1)


def test_training_with_workers_may_open_more_files(
    bases: dict[str, Path], rows: list[Conversation], tmp_path: Path
) -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most <= 1024:
        pytest.skip(f"the system allows {most} open files and not one more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    try:
        curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=ONE_STAGE, workers=1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (
            65_536 if most == resource.RLIM_INFINITY else min(65_536, most),
            most,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


def test_a_note_longer_than_its_place_is_cut_and_the_training_process_writes_none() -> None:
    notes = WorkerNotes(1)
    notes.write("nobody is a worker here")
    assert notes.read() == []

    class Long(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> int:
            notes.write("ä" * 3000)
            return row

    list(torch.utils.data.DataLoader(Long(), num_workers=1, multiprocessing_context="fork"))
    (note,) = notes.read()
    assert note.is_dead and note.seconds < 60 and set(note.text) <= {"ä", "\ufffd"} and len(note.text) > 900

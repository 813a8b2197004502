"""The feature cache however filling it was disturbed: kills, signals, a full disk, several processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kills
import pytest
import torch
from cached import ROOT, agree, bases, cut, images, run, stored

from llavamed_peft import (
    StageAdapter,
)
from llavamed_peft.features import filling, store
from llavamed_peft.reporting import progress
from llavamed_peft.storage import whole
from llavamed_peft.training.trainer import StageTrainer

# What happens to a call of `benchmarks/kills.py`


def in_files_of_two() -> None:
    store.IMAGES_PER_FILE = 2


def at_flush(number: int, then: Callable[..., object], *arguments: object) -> None:
    """Before a feature cache flushes for this number of times: a plan and its folder first, then a file and
    its folder."""
    in_files_of_two()
    flush, flushed = whole.flush, 0

    def watched(path: Path) -> None:
        nonlocal flushed
        flushed += "features" in path.parts
        if flushed == number:
            then(*arguments)
        flush(path)

    whole.flush = watched


def at_call(name: str, then: Callable[..., object], *arguments: object) -> None:
    """Each time before the feature cache calls something; every line of its progress is shown."""
    in_files_of_two()
    progress.SECONDS_BETWEEN_LINES = -1
    called = getattr(filling, name)

    def watched(*how: object) -> object:
        then(*arguments)
        return called(*how)

    setattr(filling, name, watched)


def signal_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_in_training() -> None:
    in_files_of_two()
    step = StageTrainer.training_step

    def training_step(self: StageTrainer, *inputs: object) -> torch.Tensor:
        if self.stage.name == "vqa" and self.state.global_step == 3:
            signal_myself(signal.SIGKILL)
        return step(self, *inputs)

    StageTrainer.training_step = training_step


def limit_file_size(size: int) -> None:
    in_files_of_two()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a run that was left alone, `lora`."""
    folder = tmp_path_factory.mktemp("disturbed")
    kills.write_data(folder)
    call(folder, folder / "lora", in_files_of_two)
    return folder


def call(place: Path, out: Path, before: Callable[..., object], *how: object, exit_code: int = 0) -> str:
    """Make the call in a process of its own; returns what it said."""
    process = kills.start(place, out, "lora", before, *how, feature_cache=True)
    process.join(280)
    log = Path(f"{out}.log")
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == exit_code, said
    log.unlink()
    return said


def test_killed_while_it_was_filled_and_while_it_was_used_nothing_changes(place: Path) -> None:
    out = place / "killed"
    call(place, out, at_flush, 1, signal_myself, signal.SIGKILL, exit_code=-signal.SIGKILL)
    (folder,) = (out / "features").iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".partial"], "not even a plan"
    call(place, out, at_flush, 5, signal_myself, signal.SIGKILL, exit_code=-signal.SIGKILL)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".partial", ".safetensors"]
    (whole,) = folder.glob("[!.]*.safetensors")
    written = whole.stat().st_mtime_ns
    said = call(place, out, kill_in_training, exit_code=-signal.SIGKILL)
    assert "feature cache: 4 of 5 images stored" in said, (
        "seven in four files, one of two whole, and one cannot be decoded"
    )
    assert whole.stat().st_mtime_ns == written and not list(folder.glob(".*"))
    said = call(place, out, in_files_of_two)
    assert "images stored" not in said and "vqa        feature cache on: 7 images, " in said
    kills.check_same(place / "lora", out)
    assert not (out / "features").exists()


def test_stopped_while_it_is_filled_it_says_what_stays(place: Path) -> None:
    out = place / "stopped"
    said = call(place, out, at_flush, 5, signal_myself, signal.SIGTERM, exit_code=1)
    assert said.rstrip().endswith(
        "llavamed_peft.errors.Interrupted: Stopped by SIGTERM while the feature cache of stage 'align' was "
        "filled; 2 of 4 files that were missing are complete and stay. This stage has no checkpoint; make "
        "the same call again to start it again after the finished stages."
    )
    assert "feature cache: 2 of 3 images stored" in call(place, out, in_files_of_two)
    kills.check_same(place / "lora", out)


@pytest.mark.parametrize(
    ("name", "line", "done"),
    [
        ("ContentNames", None, "equal images were being found"),
        ("content_key", "6 images looked at for equal ones", "its images were being read"),
        ("is_whole", "6 of 7 images read", "its files were being checked"),
        ("fill", "3 of 4 files checked", "0 of 4 files that were missing are complete and stay"),
    ],
)
def test_whatever_it_is_at_it_says_so_and_can_be_stopped(
    name: str, line: str | None, done: str, place: Path
) -> None:
    said = call(
        place, place / f"stopped at {name}", at_call, name, signal_myself, signal.SIGTERM, exit_code=1
    )
    assert line is None or f"align      feature cache: {line}\n" in said
    assert (
        f"Stopped by SIGTERM while the feature cache of stage 'align' was filled; {done}. This stage has no "
        in said
    )


def test_a_full_disk_is_said_and_once_there_is_room_it_resumes(place: Path) -> None:
    out = place / "full"
    last = call(place, out, limit_file_size, 20_000, exit_code=1).rstrip().splitlines()[-1]
    assert "TrainingError" in last and ".safetensors: cannot be written (" in last
    assert last.endswith("which keeps what is stored; or pass feature_cache=False, which stores nothing.")
    assert not list((out / "features").rglob("*.safetensors")) and not list(
        (out / "features").rglob("*.partial")
    )
    call(place, out, in_files_of_two)
    kills.check_same(place / "lora", out)


SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from llavamed_peft import Conversation, Curriculum, LoraSpec, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.features import filling, store
from llavamed_peft.training.optimizer import parameter_groups
from llavamed_peft.training.trainer import StageTrainer

base, images, out, processes = sys.argv[1:]

def plain_descent(self, model=None):  # Adam would blow rounding up
    self.optimizer = torch.optim.SGD(parameter_groups(model or self.model, self.stage.schedule, 0.0, ()))
    return self.optimizer

def fill(path, *how):
    with open(f"{out}.{PartialState().process_index}", "a") as wrote:
        wrote.write(path.name + "\\n")
    return write(path, *how)

StageTrainer.create_optimizer = plain_descent
write, filling.fill = filling.fill, fill
store.IMAGES_PER_FILE = 2
def asked(i, *images):
    turns = (Turn("user", "<image>" * len(images) + " what?"), Turn("assistant", "a heart " * (1 + i % 3)))
    return Conversation(str(i), turns, images)

rows = [asked(i, f"{images}/{i % 6}.png") for i in range(7)]
rows += [asked(8), asked(9), asked(10, f"{images}/cut.png")]
schedule = Schedule(epochs=2, learning_rate=0.05, global_batch=5)
lora = LoraSpec(rank=4, alpha=8, dropout=0.0)
stages = Stage("align", "projector", schedule), Stage("vqa", "lora", schedule, lora)
data = {stage.name: rows for stage in stages}
how = dict(max_rejected=0.1, feature_cache=True, max_row_tokens=60)
curriculum_finetune(base, data, out, curriculum=Curriculum(stages), **how)
assert PartialState().num_processes == int(processes), PartialState()
"""


@pytest.mark.slow
def test_two_processes_divide_the_images_and_learn_what_one_does(
    bases: dict[str, Path], images: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    cut(images[6])
    os.rename(images[6], Path(images[6]).with_name("cut.png"))
    for processes in (1, 2):
        torchrun = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        )
        words = [script, bases["llava"], tmp_path / "images", tmp_path / str(processes), processes]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *torchrun, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, *shares = ((tmp_path / name).read_text().split() for name in ("1.0", "2.0", "2.1"))
    assert [len(alone), *map(len, shares)] == [4, 2, 2] and {*shares[0], *shares[1]} == set(alone)
    for stage in ("align", "vqa"):
        one, two = (StageAdapter.load(tmp_path / name / stage) for name in "12")
        agree(one, two, 1e-5)
        assert one.metrics["cached_images"] == two.metrics["cached_images"] == 6
        assert one.record.data == two.record.data and one.record.data[0].failed == 1

"""Several processes of which one fails, or takes longer than the others would wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import ROOT, place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FAILS = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from llavamed_peft import Conversation, Curriculum, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.cli.launching import start
from llavamed_peft.errors import DataError, TrainingError
from llavamed_peft.packing import collator
from llavamed_peft.training.optimizer import parameter_groups
from llavamed_peft.training.trainer import StageTrainer

@dataclass
class Words:
    base: str
    image: str
    out: str
    fault: str

def lost(path):
    raise DataError(f"{path}: no such file; wanted an image.")

def main(words):
    def training_step(self, *inputs):
        if self.state.global_step == 1 and words.fault == "lost":
            collator.load_image = lost
        elif self.state.global_step == 1 and os.environ["RANK"] == "1":
            Path(words.out, "failed").write_text(str(time.time()))
            raise {"said": TrainingError, "odd": OSError}[words.fault]("the disk is on fire")
        return step(self, *inputs)

    step, StageTrainer.training_step = StageTrainer.training_step, training_step
    row = Conversation("0", (Turn("user", "<image> what?"), Turn("assistant", "a heart")), (words.image,))
    stage = Stage("more", "full", Schedule(epochs=1, learning_rate=0.01, global_batch=2))
    how = dict(curriculum=Curriculum((stage,)), feature_cache=False)
    curriculum_finetune(words.base, {"more": [row] * 6}, words.out, **how)

start(main, Words)
"""


@pytest.mark.parametrize(
    ("fault", "how"), [("said", {}), ("odd", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})]
)
def test_one_process_that_fails_ends_all_of_them_and_is_named(
    fault: str, how: dict[str, str], place: Path, tmp_path: Path
) -> None:
    """The other waits for it in a collective that would last half an hour."""
    done = fails(fault, how, place, tmp_path)
    assert done.returncode == 1 and (tmp_path / "out" / "failed").exists(), done.stderr
    error = f"{'TrainingError' if fault == 'said' else 'OSError'}: the disk is on fire"
    first = next(line for line in done.stderr.splitlines() if "Error" in line)
    assert error in first or (fault == "odd" and "[rank1]:" in first)  # torchrun's are unbuffered: lines mix
    cause = done.stderr.rpartition("Root Cause (first observed failure)")[2]
    assert "rank      : 1" in cause and error in cause
    assert not (tmp_path / "out" / "more").exists()


def test_processes_whose_images_vanish_end_together_and_list_every_row(place: Path, tmp_path: Path) -> None:
    done = fails("lost", {}, place, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "in memory: 2 of 6 rows cannot be used (33.3%; max_rejected is 5.0%)." in done.stderr
    assert "The checkpoint of step 2 is intact; make the same call again to resume from it." in done.stderr
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["failed while training more"] * 2
    assert not (tmp_path / "out" / "more").exists()


def fails(fault: str, how: dict[str, str], place: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes that meet a fault after the first step of three."""
    script = folder / "fails.py"
    script.write_text(FAILS, encoding="utf-8")
    words = ["--base", place / "base", "--image", place / "0.png", "--out", folder / "out", "--fault", fault]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(script),
            *map(str, words),
        ],
        env={**os.environ, **how, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


WAITING = """
import time
from datetime import timedelta
from accelerate import PartialState
from llavamed_peft.running.run import _others_wait

processes = PartialState(cpu=True, timeout=timedelta(seconds=2))
began = time.monotonic()
with _others_wait(processes):
    if processes.is_main_process:
        time.sleep(5)
assert time.monotonic() - began >= 5 and processes.num_processes == 2
processes.wait_for_everyone()
"""


def test_others_wait_for_an_index_longer_than_the_training_groups_barrier_would(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "waiting.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

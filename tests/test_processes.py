"""Several processes train what one does: really several, over gloo, started by torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from llavamed_peft import StageAdapter
from llavamed_peft.report import read_metrics

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os
import signal
import sys
import torch
from accelerate import PartialState
from llavamed_peft import Conversation, Curriculum, LoraSpec, Schedule, Stage, Turn, curriculum_finetune
from llavamed_peft.training import StageTrainer

base, images, out, processes, stopped = sys.argv[1:]

def plain_descent(self, model=None):  # Adam would blow rounding up
    groups = self.optimizer_groups(self.model if model is None else model)
    self.optimizer = torch.optim.SGD(groups)
    return self.optimizer

StageTrainer.create_optimizer = plain_descent
compute = StageTrainer._summed_loss

def stopping(self, model, batch):  # the last process alone is signalled, while it computes
    if (self.stage.name, self.state.global_step, self.args.process_index) == ("vqa", 3, int(processes) - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return compute(self, model, batch)

if stopped == "stopped":
    StageTrainer._summed_loss = stopping
said = (Turn("user", "<image>\\nwhat is this?"), Turn("assistant", "a heart"))
answers = [Turn("assistant", "a heart " * (1 + i % 3)) for i in range(9)]
rows = [Conversation(str(i), (said[0], answer), (f"{images}/{i % 4}.png",)) for i, answer in enumerate(answers)]
rows += [Conversation("text", (Turn("user", "what is a lung?"), Turn("assistant", "an organ"))) for _ in range(2)]
rows += [Conversation("cut", said, (f"{images}/cut.png",))]
schedule = Schedule(epochs=2, learning_rate=0.05, global_batch=5)
lora = LoraSpec(rank=4, alpha=8, dropout=0.0)
curriculum = Curriculum((Stage("align", "projector", schedule), Stage("vqa", "lora", schedule, lora)))
data = {"align": rows, "vqa": rows}
curriculum_finetune(base, data, out, curriculum=curriculum, eval_data=data, eval_steps=2, max_row_tokens=100)
assert PartialState().num_processes == int(processes), PartialState()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny.build(folder / "base")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    for i in range(4):
        Image.new("RGB", (40 + 20 * i, 60), (50 * i, 90, 20)).save(folder / f"{i}.png")
    Image.effect_noise((90, 60), 50).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def launch(place: Path, processes: int, out: Path | None = None, stopped: bool = False) -> Path:
    out = place / f"run-{processes}" if out is None else out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    program = [sys.executable] if processes == 1 else torchrun
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(place / "script.py"), str(place / "base"), str(place), str(out), str(processes), "stopped" if stopped else ""]
    done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == stopped, done.stderr[-3000:]
    assert ("Stopped by SIGTERM behind step 4 of 6 of stage 'vqa'" in done.stderr) == stopped, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    return launch(place, 1)


def agree(one: Path, other: Path, bound: float) -> None:
    """Two runs left the same tensors, up to a bound."""
    for stage in ("align", "vqa"):
        tensors = StageAdapter.load(other / stage).tensors()
        for name, tensor in StageAdapter.load(one / stage).tensors().items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=bound)


@pytest.mark.slow
def test_processes_stop_together_and_go_on_as_many_or_fewer(place: Path, alone: Path) -> None:
    stopped = launch(place, 2, place / "stopped", stopped=True)
    assert sorted(path.name for path in (stopped / "checkpoints" / "vqa").iterdir()) == ["step-3", "step-4"]
    fewer = Path(shutil.copytree(stopped, place / "fewer"))
    agree(launch(place, 2), launch(place, 2, stopped), 0)
    agree(alone, launch(place, 1, fewer), 1e-5)
    for run in (stopped, fewer):
        assert (run / "rejected.jsonl").read_text() == (alone / "rejected.jsonl").read_text()
        steps = [(record["stage"], record["step"], "loss" in record) for record in read_metrics(run)]
        assert steps == [(record["stage"], record["step"], "loss" in record) for record in read_metrics(alone)]


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_tensors_and_counts_are_one_processes(processes: int, place: Path, alone: Path) -> None:
    together = launch(place, processes)
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, together)]
    assert len(logs[0]) == len(logs[1])
    for one, several in zip(*logs, strict=True):
        for key in ("loss", "eval_loss"):
            assert several.get(key) == pytest.approx(one.get(key), abs=1e-5)
    for stage in ("align", "vqa"):
        one, several = StageAdapter.load(alone / stage), StageAdapter.load(together / stage)
        assert (one.record["processes"], several.record["processes"]) == (1, processes)
        assert one.record["data"] == several.record["data"] and one.record["data"][0]["failed"] == 1
        for key in ("steps", "conversations", "supervised_tokens"):
            assert one.metrics[key] == several.metrics[key]
    agree(alone, together, 1e-5)
    assert (alone / "rejected.jsonl").read_text() == (together / "rejected.jsonl").read_text()

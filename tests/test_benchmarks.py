"""The benchmarks run, and compare what can be compared; what they measure stands in `benchmarks/LOG.md`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_stage_overhead_compares_equal_work_and_prints_its_log_entry():
    small = ["--repeats=1", "--steps=2", "--conversations=3", "--device_batch=2", "--image_size=28"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "stage_overhead.py"), *small],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr  # it stops where losses or trainable parameters of the two sides differ
    lines = done.stdout.splitlines()
    assert lines[0].endswith("stage_overhead: a stage beside the bare trainer")
    assert f"- Command: `python benchmarks/stage_overhead.py {' '.join(small)}`" in lines
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "a stage of `curriculum_finetune`",
        "bare `SFTTrainer`",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("launch", [{}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}])
def test_processes_send_what_the_formula_says(launch: dict[str, str], tmp_path: Path) -> None:
    script = [str(ROOT / "benchmarks" / "communication.py"), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script],
        capture_output=True,
        text=True,
        env=os.environ | launch | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]  # it fails where what is sent is not the formula's
    found = json.loads(next(line for line in done.stdout.splitlines() if '"method"' in line))
    assert (found["method"], found["processes"], found["batches"]) == ("fsdp2" if launch else None, 2, 4)
    documented = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert all(f"{number:,}" in documented for number in found["sent"].values())

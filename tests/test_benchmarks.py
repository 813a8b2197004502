"""The benchmarks run, and compare what can be compared; what they measure stands in `benchmarks/LOG.md`."""

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
def test_kills_compares_and_prints_its_log_entry():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills=1", "--seed=3"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr  # it stops where a run did not end as it should
    lines = done.stdout.splitlines()
    assert lines[0].endswith("kills: runs killed at random moments and gone on with")
    assert any(line.startswith("- Result: as expected. 1 kills (") for line in lines)

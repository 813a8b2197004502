"""The benchmarks run, and compare what can be compared; what they measure is in `benchmarks/LOG.md`."""

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
    # It stops where losses or trainable parameters of the two sides differ
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("stage_overhead: a stage beside the bare trainer")
    assert f"- Command: `python benchmarks/stage_overhead.py {' '.join(small)}`" in lines
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "a stage of `curriculum_finetune`",
        "bare `SFTTrainer`",
    ]


@pytest.mark.slow
def test_data_path_takes_every_row_through_each_part_and_prints_its_log_entry():
    small = ["--rows=300", "--epochs=2", "--real_rows=40", "--workers=2", "--every=0.1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "data_path.py"), *small],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr  # it stops where rows get lost on the way
    lines = done.stdout.splitlines()
    assert lines[0].endswith("data_path: rows checked, found again, decoded")
    assert f"- Command: `python benchmarks/data_path.py {' '.join(small)}`" in lines
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    assert [row[:2] for row in cells] == [
        ["16×16 to 28×28, packed, epoch 1", "300"],
        ["16×16 to 28×28, packed, epoch 2", "300"],
        ["640×480 to 336×336, packed", "40"],
        ["640×480 to 336×336, padded", "40"],
    ]
    assert done.stderr.count("index      300 conversations, checked before") == 4, (
        "three starts and the epochs find the index"
    )


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
    assert lines[0].endswith("kills: runs killed at random moments and resumed")
    assert any(line.startswith("- Result: as expected. 1 kills (") for line in lines)


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
    # It fails where what is sent is not the formula's
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if '"method"' in line))
    assert (found["method"], found["processes"], found["batches"]) == ("fsdp2" if launch else None, 2, 4)
    documented = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert all(f"{number:,}" in documented for number in found["sent"].values())


def table(lines: list[str]) -> list[list[str]]:
    """Cells of the tables' rows, heads included."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


@pytest.mark.slow
def test_packing_compares_equal_work_and_prints_its_log_entry():
    small = [
        "--pairs=1",
        "--conversations=8",
        "--device_batches=2",
        "--image_size=56",
        "--width=64",
        "--layers=2",
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "packing.py"),
            "--work",
            "vqa",
            "align",
            *small,
            "--vocabulary=512",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    # It stops where losses or trainable parameters of the two sides differ
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = next(line for line in lines if line.startswith("## "))
    assert heading.endswith("packing: packed training beside TRL at its best")
    rows = table(lines)[1:]
    assert [(row[0], row[1]) for row in rows] == [
        ("vqa", "packed"),
        ("vqa", "ours, padded"),
        ("vqa", "TRL, best settings"),
        ("vqa", "TRL, an image's questions as one dialogue"),
        ("align", "packed"),
        ("align", "ours, padded"),
        ("align", "TRL, best settings"),
        ("align", "TRL, defaults"),
    ]
    bounds = {row[0]: float(row[7]) for row in rows if row[1] == "TRL, best settings"}
    assert bounds["vqa"] > 4 > 1.5 > bounds["align"], "what is shared decides the bound"
    assert float(rows[0][8].rstrip("%")) > 97
    assert all(0 <= float(row[4].rstrip("%")) < 100 for row in rows if "TRL" not in row[1]), (
        "the share of time spent waiting"
    )


@pytest.mark.slow
def test_waiting_tells_what_the_model_waited_and_prints_its_log_entry():
    small = ["--repeats=1", "--steps=3", "--image_size=56", "--width=64", "--layers=1", "--vocabulary=512"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "waiting.py"), *small],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout.splitlines())[1:]
    assert [row[:2] for row in rows] == [
        [work, workers] for work in ("vqa", "align") for workers in ("0", "1")
    ]
    assert all(
        0 <= float(row[2].partition("%")[0]) < 100 and float(row[3].partition(" ")[0]) > 0 for row in rows
    )


@pytest.mark.slow
def test_packing_gpu_runs_in_miniature_and_in_slices(tmp_path):
    small = [
        "--tiny",
        "--quantization",
        "none",
        "--row_tokens=200",
        "--device_batches=2",
        "--conversations=8",
        "--steps=2",
    ]
    printed = []
    for more in (["--repeats=1", "--arms", "packed", "TRL"], ["--repeats=1"], ["--repeats=9", "--minutes=0"]):
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "packing_gpu.py"),
                *small,
                "--folder",
                str(tmp_path),
                *more,
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=280,
        )
        assert done.returncode == 0, done.stderr  # it stops where the arms do not do the same work
        printed.append((table(done.stdout.splitlines())[1:], done.stderr.count("repeat 1")))
    assert [ran for _, ran in printed] == [2, 2, 0], "each call resumes after the one before"
    assert printed[1][0] == printed[2][0]
    assert [row[:3] for row in printed[2][0]] == [
        ["bf16", "TRL", "2 conversations"],
        ["bf16", "packed (sdpa)", "200"],
        ["bf16", "packed, sdpa", "200"],
        ["bf16", "padded", "200"],
    ]
    assert all(float(row[4].split("**")[1]) > 0 for row in printed[2][0]) and printed[2][0][0][4].startswith(
        "**1.00**"
    )

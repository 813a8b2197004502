"""Runs of `benchmarks/kills.py` that are disturbed at a given moment."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import kills
import pytest
import torch

from llavamed_peft.batches.decoding import DeviceInputs
from llavamed_peft.errors import DataError
from llavamed_peft.packing import collator
from llavamed_peft.training.trainer import StageTrainer

ROOT = Path(__file__).parents[1]
STEPS = {"align": 6, "vqa": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    kills.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, tuple[float, int]]:
    """A run of each kind that was left alone, in `<place>/<kind>`: its seconds and file operations."""
    return {kind: kills.measure(place, kind) for kind in kills.KINDS}


@pytest.fixture
def out(place: Path, request: pytest.FixtureRequest, undisturbed: dict[str, tuple[float, int]]) -> Path:
    return place / request.node.name


# What happens to a call


def during(stage: str, steps: int, training: bool, then: Callable[..., object], *arguments: object) -> None:
    """After so many steps of a stage, in the first device batch of the next one or of the held-out loss,
    something happens."""
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
    """The step after these has an image that is not a number."""
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


def resume_and_compare(place: Path, out: Path, **changes: object) -> None:
    """The same call comes to its end, which is that of the run that was left alone."""
    kills.finish(kills.start(place, out, "lora", **changes), out)
    kills.check_same(place / "lora", out)


def said(out: Path) -> str:
    return Path(f"{out}.log").read_text(encoding="utf-8")


def steps_saved(out: Path, stage: str) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (out / "checkpoints" / stage).glob("step-*")
    )

"""How many workers start: cores, and room in shared memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from decoded import KINDS, ONE_STAGE, bases, batches_of, rows
from PIL import Image

from llavamed_peft import Conversation, Question, Turn, curriculum_finetune
from llavamed_peft.batches import loader
from llavamed_peft.batches.workers import workers_with_room
from llavamed_peft.features import store
from llavamed_peft.packing import collator
from llavamed_peft.training.computing import _decoders


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, None, 1), (6, None, 6), (64, None, 8), (16, "8", 2), (4, "8", 1)]
)
def test_processes_of_one_machine_share_its_cores_for_decoding(
    cores: int, processes: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert _decoders() == expected


@pytest.mark.parametrize(
    ("free", "processes", "expected"),
    [
        (None, 1, 8),
        (64e9, 1, 8),
        (64e9, 8, 3),
        (18e9, 1, 8),
        (17.9e9, 1, 7),
        (4e9, 1, 1),
        (3.9e9, 1, 0),
        (64e6, 1, 0),
        (0, 1, 0),
    ],
)
def test_as_many_workers_as_have_room_for_a_step_each_and_one_more(
    free: int | None, processes: int, expected: int
) -> None:
    assert workers_with_room(8, 1e9, free, processes) == expected
    assert workers_with_room(8, 0, free, processes) == (0 if free == 0 else 8), "nothing but text"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_step_are_known_without_decoding(
    kind: str,
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = (Turn("user", "<image>\n<image>\nwhich is larger?"), Turn("assistant", "the second"))
    rows = [
        *rows,
        Conversation("two", both, (*rows[0].images, *rows[7].images)),
        Conversation("none", (Turn("user", "a"), both[1])),
    ]
    batches = batches_of(bases[kind], rows, tmp_path, None)
    encoder = batches.collator.encoder
    pixels = [batches[[row]].inputs.get("pixel_values") for row in range(len(rows))]
    found = [
        values.unflatten(0, (len(values), 1)) if values.ndim == 4 else values
        for values in pixels
        if values is not None
    ]
    monkeypatch.setattr(collator, "load_image", None)
    assert batches.index.mean_tiles(encoder) * len(rows) * encoder.tile_bytes == sum(
        values.nbytes for values in found
    )


PIXELS = "0 workers instead of 2: {} has about {} of pixels, and /dev/shm has 75.3 kB free"


@pytest.mark.parametrize(
    ("feature_cache", "said"),
    [
        (False, [PIXELS.format("a step", "75.3 kB"), PIXELS.format("a held-out step", "37.6 kB")]),
        # Of its features, 4.4 kB, there is room for the steps of two workers
        (
            True,
            [PIXELS.format("an image", "37.6 kB")],
        ),
    ],
)
def test_what_has_no_room_is_decoded_in_the_training_process_and_a_line_says_so(
    feature_cache: bool,
    said: list[str],
    bases: dict[str, Path],
    rows: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = [Question("asked", rows[0].images[0], "what?", "a heart", "closed")]
    load_image = collator.load_image

    def in_training_process(path: str) -> Image.Image:
        assert torch.utils.data.get_worker_info() is None
        return load_image(path)

    def run(name: str, workers: int) -> dict[str, torch.Tensor]:
        adapters = curriculum_finetune(
            bases["llava"], {"vqa": rows}, tmp_path / name, curriculum=ONE_STAGE, eval_data={"vqa": held_out},
            feature_cache=feature_cache, workers=workers, eval_steps=2,
        )  # fmt: skip
        return adapters["vqa"].tensors()

    monkeypatch.setattr(loader, "free_shared_memory", lambda: 1_000_000_000)
    wanted = run("room", 2)
    assert "workers instead of" not in capsys.readouterr().err
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 2 * 3 * 56 * 56 * 4)  # a step's pixels
    for module in (collator, store):
        monkeypatch.setattr(module, "load_image", in_training_process)
    found = run("none", 2)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    lines = [line for line in capsys.readouterr().err.splitlines() if "workers instead of" in line]
    assert lines == [f"vqa        {line}" for line in said]

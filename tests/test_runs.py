"""One call of `curriculum_finetune`: how it is computed changes nothing, and what goes wrong is counted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from three_stages import ROOT, THREE, bases, conversations, images, schedule
from transformers import AutoModelForImageTextToText

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Question,
    Stage,
    StageAdapter,
    curriculum_finetune,
    load_stage,
)
from llavamed_peft.errors import TrainingError
from llavamed_peft.packing import PackedCollator, collator
from llavamed_peft.running.run import Run
from llavamed_peft.running.summary import read_metrics
from llavamed_peft.storage.hashing import file_sha256
from llavamed_peft.storage.images import load_image


def test_order_and_dropout_are_a_function_of_the_seed(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(seed: int, name: str) -> dict[str, torch.Tensor]:
        stage = Stage("vqa", "lora", schedule(), LoraSpec(rank=4, alpha=8, dropout=0.2))
        curriculum = Curriculum((stage,), seed=seed)
        return curriculum_finetune(
            bases["llava"], {"vqa": conversations}, tmp_path / name, curriculum=curriculum
        )["vqa"].tensors()

    first, again, other = run(1, "first"), run(1, "again"), run(2, "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_base_trains_in_fp32_and_rounds_only_what_is_loaded(
    dtype: str, conversations: list[Conversation], tmp_path: Path
) -> None:
    base = tiny.build(tmp_path / "base", dtype=torch.bfloat16)
    adapter = curriculum_finetune(
        base, {"vqa": conversations}, tmp_path / "run", curriculum=Curriculum((THREE["vqa"],)), dtype=dtype
    )["vqa"]
    tensors = adapter.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    projector = [name for name in tensors if "multi_modal_projector" in name]
    assert any(not torch.equal(tensors[name], tensors[name].bfloat16().float()) for name in projector)
    model, processor = load_stage(base, adapter)
    assert model.get_base_model().dtype == torch.bfloat16
    merged = AutoModelForImageTextToText.from_pretrained(adapter.merge(base, tmp_path / "merged"))
    assert merged.dtype == torch.bfloat16
    batch = PackedCollator(processor)(conversations)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        unmerged_loss, merged_loss = (model.eval()(**batch).loss.item(), merged.eval()(**batch).loss.item())
    assert merged_loss == pytest.approx(unmerged_loss, abs=0.05)  # bf16 has eight bits
    loaded = load_stage(base, adapter, dtype="float32")[0]
    name = "base_model.model.model.multi_modal_projector.linear_1.weight"
    kept = loaded.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    assert torch.equal(kept, tensors[name])


def test_nf4_trains_and_its_adapter_loads_on_the_raw_base(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    adapters = curriculum_finetune(
        bases["llava"],
        dict.fromkeys(("align", "instruct", "vqa"), conversations),
        tmp_path,
        curriculum=THREE,
        quantization="nf4",
        eval_data={"vqa": conversations},
    )
    assert adapters["vqa"].metrics["eval_loss_after"] < adapters["vqa"].metrics["eval_loss_before"]
    model, processor = load_stage(bases["llava"], adapters["vqa"], quantization="nf4")
    with torch.no_grad():
        loss = model(**PackedCollator(processor)(conversations)).loss.item()
    assert loss == pytest.approx(adapters["vqa"].metrics["eval_loss_after"], abs=1e-4)
    load_stage(bases["llava"], adapters["vqa"])
    parent, child = adapters["align"].tensors(), adapters["instruct"].tensors()
    moved = [name for name in parent if not torch.equal(parent[name], child[name])]
    assert moved, "the projector stood still in bf16 steps"


def test_undecodable_image_leaves_its_step_and_is_counted(
    bases: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_noise((90, 60), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    # The header is fine, the pixels end too soon
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    good = [Question(str(i), str(images / f"{i}.png"), "what?", "yes", "closed") for i in range(5)]
    bad = Question("bad", str(tmp_path / "cut.png"), "what?", "yes", "closed")
    curriculum = Curriculum((Stage("vqa", "projector", schedule(epochs=2, global_batch=3)),))
    call = {"data": {"vqa": [*good, bad]}, "max_rejected": 0.2}
    adapter = curriculum_finetune(bases["llava"], output_dir=tmp_path / "run", curriculum=curriculum, **call)[
        "vqa"
    ]
    (entry,) = adapter.record.data
    assert (entry.rows, entry.used, entry.rejected, entry.failed) == (6, 5, {}, 1)
    assert adapter.metrics["conversations"] == 10 and adapter.metrics["steps"] == 4
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == "bad" and json.loads(line)["row"] == 6
    told = (
        "vqa        1 of 6 training conversations could not be decoded and were left out, such as: "
        f"{tmp_path / 'cut.png'}: "
    )
    assert told in capsys.readouterr().err
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=1)),))
    alone = curriculum_finetune(bases["llava"], output_dir=tmp_path / "alone", curriculum=curriculum, **call)[
        "vqa"
    ]
    losses = [record["loss"] for record in read_metrics(tmp_path / "alone") if "loss" in record]
    assert alone.metrics["steps"] == 6 and len(losses) == 5 and min(losses) > 0, (
        "a step that lost all it had has no loss"
    )


def test_workers_change_nothing(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(workers: int) -> dict[str, torch.Tensor]:
        return curriculum_finetune(
            bases["llava"],
            {"align": conversations},
            tmp_path / str(workers),
            curriculum=Curriculum((THREE["align"],)),
            workers=workers,
        )["align"].tensors()

    inside, outside = run(0), run(2)
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


def test_device_batches_change_nothing_but_rounding(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    def run(max_row_tokens: int, checkpointing: bool, layout: str = "packed") -> StageAdapter:
        return curriculum_finetune(
            bases["llava"],
            {"vqa": conversations},
            tmp_path / f"{max_row_tokens} {checkpointing} {layout}",
            curriculum=Curriculum((THREE["vqa"],)),
            layout=layout,
            max_row_tokens=max_row_tokens,
            gradient_checkpointing=checkpointing,
            eval_data={"vqa": conversations},
        )["vqa"]

    whole, single, checkpointed, padded = (
        run(100_000, False),
        run(1, False),
        run(100, True),
        run(150, False, "padded"),
    )
    assert (whole.record.computing["layout"], padded.record.computing["layout"]) == ("packed", "padded")
    for other in (single, checkpointed, padded):
        assert other.metrics["loss_last"] == pytest.approx(whole.metrics["loss_last"], abs=1e-4)
        assert other.metrics["eval_loss_after"] == pytest.approx(whole.metrics["eval_loss_after"], abs=1e-4)


def test_report_to_tensorboard_writes_events(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    curriculum_finetune(
        bases["llava"],
        {"align": conversations},
        tmp_path,
        curriculum=Curriculum((THREE["align"],)),
        report_to="tensorboard",
    )
    events = list((tmp_path / "logs" / "align").rglob("events.out.tfevents.*"))
    assert events and events[0].stat().st_size > 100


def test_held_out_evaluation_does_not_change_what_is_learnt(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    curriculum = Curriculum((Stage("vqa", "lora", schedule(), LoraSpec(rank=4, alpha=8, dropout=0.3)),))
    plain = curriculum_finetune(
        bases["llava"], {"vqa": conversations}, tmp_path / "plain", curriculum=curriculum
    )["vqa"]
    data = {"vqa": conversations}
    watched = curriculum_finetune(
        bases["llava"], data, tmp_path / "watched", curriculum=curriculum, eval_data=data, eval_steps=1
    )["vqa"]
    tensors = watched.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.tensors().items())


def test_a_hub_base_is_known_by_id_revision_and_content(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    """In a process of its own, since the library reads the cache's place when it is imported."""
    revision, blobs = "a" * 40, tmp_path / "hub" / "models--org--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / revision
    for folder in (blobs, snapshot, blobs.parent / "refs"):
        folder.mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text(revision)
    for path in bases["llava"].iterdir():
        blob = blobs / file_sha256(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    script = f"""
from llavamed_peft import *
rows = [Question(str(i), {conversations[0].images[0]!r}, "what?", "yes", "closed") for i in range(4)]
stage = Stage("align", "projector", Schedule(epochs=2, learning_rate=1e-3, global_batch=2))
curriculum_finetune("org/tiny", {{"align": rows}}, "run", curriculum=Curriculum((stage,)))
"""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    adapter = StageAdapter.load(tmp_path / "run" / "align")
    base = adapter.record.base
    assert (base.id, base.revision) == ("org/tiny", revision)
    assert base.sha256 == file_sha256(bases["llava"] / "model.safetensors")
    assert adapter.peft_config().base_model_name_or_path == "org/tiny"
    assert "\nbase_model: org/tiny\nbase_model_relation: adapter\n" in (adapter.path / "README.md").read_text(
        encoding="utf-8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_stage(bases["llava"], adapter)  # a folder with the same weights is the same base


@pytest.mark.parametrize(
    ("epochs", "seen", "told"),
    [
        (1, 4, r"4 of 4 rows cannot be used \(100\.0%; max_rejected is 100\.0%\)"),
        (0.5, 2, "Not one conversation of stage 'vqa' could be decoded; nothing was written"),
    ],
)
def test_images_that_all_vanish_leave_no_stage(
    epochs: float,
    seen: int,
    told: str,
    bases: dict[str, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    rows = [Question(str(i), str(folder / f"{i}.png"), "what?", "yes", "closed") for i in range(4)]
    stage = Run.stage

    def vanish_first(self: Run, *arguments: object) -> StageAdapter:
        shutil.rmtree(folder)
        return stage(self, *arguments)

    monkeypatch.setattr(Run, "stage", vanish_first)
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=2, epochs=epochs)),))
    with pytest.raises(TrainingError, match=told):
        curriculum_finetune(
            bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=curriculum, max_rejected=1
        )
    assert not (tmp_path / "run" / "vqa").exists()
    assert len((tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()) == seen
    monkeypatch.undo()
    # Found again: the same call begins the stage, for nothing had been learnt
    shutil.copytree(images, folder)
    adapter = curriculum_finetune(bases["llava"], {"vqa": rows}, tmp_path / "run", curriculum=curriculum)[
        "vqa"
    ]
    assert adapter.metrics["conversations"] == seen and adapter.record.data[0].failed == 0
    assert not (tmp_path / "run" / "rejected.jsonl").exists()


def test_rows_that_would_fill_the_memory_or_break_the_labels_are_rejected(
    bases: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    Image.new("L", (60000, 1)).save(tmp_path / "strip.png")
    good = [Question(str(i), str(images / f"{i}.png"), "what?", "yes", "closed") for i in range(4)]
    strip = Question("strip", str(tmp_path / "strip.png"), "what?", "yes", "closed")
    stop = Question("stop", str(images / "0.png"), "what?", "yes </s> no", "closed")
    curriculum = Curriculum((Stage("vqa", "projector", schedule(global_batch=2)),))
    adapter = curriculum_finetune(
        bases["llava"],
        {"vqa": [*good, strip, stop]},
        tmp_path / "run",
        curriculum=curriculum,
        max_rejected=0.5,
    )["vqa"]
    (entry,) = adapter.record.data
    assert entry.rejected == {"unreadable image": 1, "cannot be encoded": 1} and entry.used == 4
    lines = (tmp_path / "run" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert "60000 × 1 pixels" in json.loads(lines[0])["detail"]
    assert (
        "Turn 2 holds '</s>', which the tokenizer reads as a special token" in json.loads(lines[1])["detail"]
    )


def test_waiting_for_images_is_counted(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: str) -> Image.Image:
        time.sleep(0.05)
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", slow)
    shown = [conversation for conversation in conversations if conversation.images]
    curriculum = Curriculum((Stage("align", "projector", schedule(epochs=1, global_batch=1)),))
    metrics = curriculum_finetune(
        bases["llava"], {"align": shown}, tmp_path / "run", curriculum=curriculum, feature_cache=False
    )["align"].metrics
    assert 0.05 * len(shown) <= metrics["waiting_seconds"] < metrics["seconds"]
    shares = [
        (record["waiting_share"], record["seconds"])
        for record in read_metrics(tmp_path / "run")
        if "loss" in record
    ]
    waited = [share * seconds for share, seconds in shares]
    assert all(later - earlier > 0.04 for earlier, later in pairwise([0.0, *waited])), (
        "each step waits for an image of its own"
    )


def test_a_stage_that_will_learn_nothing_is_warned_of(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path: Path
) -> None:
    texts = [conversation for conversation in conversations if not conversation.images]
    for name, how, why in (
        (
            "text",
            {"epochs": 4, "global_batch": 1},
            "it trains the projector alone, and not one of its conversations shows an",
        ),
        (
            "once",
            {"epochs": 1, "global_batch": 8},
            "warm-up begins at rate 0, and there is one optimizer step",
        ),
    ):
        curriculum = Curriculum((Stage(name, "projector", schedule(**how)),))
        with pytest.warns(UserWarning, match=f"^Stage '{name}' will learn nothing: {why}"):
            curriculum_finetune(bases["llava"], {name: texts}, tmp_path / name, curriculum=curriculum)

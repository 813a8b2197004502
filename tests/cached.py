"""A stage over tiny checkpoints with a feature cache, and the same without, for tests that compare them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from staged import stage_trainer

from llavamed_peft import (
    Conversation,
    Curriculum,
    LoraSpec,
    Schedule,
    Stage,
    StageAdapter,
    Turn,
    curriculum_finetune,
)
from llavamed_peft.features.store import Features
from llavamed_peft.packing import PackedCollator
from llavamed_peft.reporting.run_log import RunLog
from llavamed_peft.training.computing import Computing
from llavamed_peft.training.stage import stored_features
from llavamed_peft.training.trainer import StageTrainer

ROOT = Path(__file__).parents[1]

KINDS = {
    "llava": (),
    "vipllava": ("llama", "clip", [-2, 1]),
    "llava_next": ("mistral",),
    "llava_onevision": ("qwen2", "siglip", -1),
}

ALL = {"align": "projector", "more": "full", "vqa": "lora"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / kind, kind, *how) for kind, how in KINDS.items()}


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Seven of several shapes, the last one's content that of the first."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        shape = (50 + 30 * (number % 3), 40 + 25 * (number % 4))
        Image.effect_noise(shape, 40 + 20 * number).convert("RGB").save(path)
    paths[6].write_bytes(paths[0].read_bytes())
    return [str(path) for path in paths]


def asked(name: str, *images: str, answer: str = "a heart") -> Conversation:
    return Conversation(
        name, (Turn("user", "<image>" * len(images) + "\nwhat is it?"), Turn("assistant", answer)), images
    )


def conversations(images: list[str]) -> list[Conversation]:
    """About one image, several, and none; each image once, one of equal content apart."""
    return [
        asked("one", images[0]),
        asked("two", images[1], images[2], answer="a lung and a heart"),
        asked("text"),
        asked("three", images[3], answer="no"),
        asked("four", images[4], images[5]),
    ]


def cut(path: str) -> str:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    return path


def trainer(
    base: Path,
    rows: list[Conversation],
    folder: Path,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> StageTrainer:
    """Of a LoRA stage of three epochs, as `train_stage` has it before it trains."""
    schedule = Schedule(epochs=3, learning_rate=1e-3, global_batch=4)
    stage = Stage("vqa", "lora", schedule, LoraSpec(rank=4, alpha=8, dropout=0.0))
    return stage_trainer(base, rows, folder, stage, layout=layout, dtype=dtype, workers=workers)


def collator_of(made: StageTrainer) -> PackedCollator:
    return made.train_steps.collator


def stored(
    made: StageTrainer, folder: Path, asked_for: bool | str = True, dtype: torch.dtype = torch.float32
) -> Features | None:
    computing = Computing(dtype, "packed", 4096, False, feature_cache=asked_for)
    return stored_features(made, computing, folder / "features", RunLog(folder))


def tensors_of(found: Features) -> dict[str, torch.Tensor]:
    names = sorted(set(found.files.values()))
    return {key: tensor for name in names for key, tensor in load_file(found.folder / name).items()}


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


# Whole runs


def schedule(**changes: object) -> Schedule:
    return Schedule(**{"epochs": 3, "learning_rate": 1e-3, "global_batch": 3, **changes})


def run(
    base: Path, rows: list[Conversation], out: Path, trains: dict[str, str] | None = None, **how: object
) -> dict[str, StageAdapter]:
    lora = LoraSpec(rank=4, alpha=8, dropout=0.1)
    stages = [
        Stage(name, scope, how.pop("schedule", schedule()), lora if scope == "lora" else None)
        for name, scope in (trains or {"vqa": "lora"}).items()
    ]
    data = {stage.name: rows for stage in stages}
    return curriculum_finetune(base, data, out, curriculum=Curriculum(tuple(stages)), **how)


def agree(one: StageAdapter, other: StageAdapter, bound: float) -> None:
    (weights,) = (path.name for path in one.path.glob("*.safetensors"))
    tensors = load_file(other.path / weights)
    for name, tensor in load_file(one.path / weights).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=bound)

"""Three tiny stages over every model class, trained once for the tests that look at what they leave."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

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
from llavamed_peft.packing import PackedCollator

KINDS = {
    "llava": ("llama", "clip", -2),
    "vipllava": ("llama", "clip", [-2, -1, 1]),
    "llava_next": ("mistral", "clip", -2),
    "llava_onevision": ("qwen2", "siglip", -1),
}

ROOT = Path(__file__).parent.parent
LORA = LoraSpec(rank=4, alpha=8, dropout=0.0)


def schedule(**changes: object) -> Schedule:
    return Schedule(**{"epochs": 1, "learning_rate": 1e-2, "global_batch": 4, **changes})


THREE = Curriculum(
    (
        Stage("align", "projector", schedule()),
        Stage("instruct", "lora", schedule(projector_learning_rate=1e-3), LORA),
        Stage("vqa", "lora", schedule(), LORA),
    )
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = random.Random(0)
    for i in range(6):
        size = generator.randint(40, 130), generator.randint(40, 130)
        Image.new("RGB", size, tuple(generator.randint(0, 255) for _ in range(3))).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def conversations(images: Path) -> list[Conversation]:
    """Twelve: of one turn and of two, with one image, two images, an image in the second turn, and none."""
    rows = []
    for i in range(8):
        turns = [
            Turn("user", "<image>\nwhat is in the image?"),
            Turn("assistant", ["a heart", "a lung", "no"][i % 3]),
        ]
        if i % 2:
            turns += [Turn("user", "is it normal?"), Turn("assistant", "yes")]
        rows.append(Conversation(str(i), tuple(turns), (str(images / f"{i % 6}.png"),)))
    two = (Turn("user", "<image><image>\nwhich is left?"), Turn("assistant", "the first"))
    rows.append(Conversation("two", two, (str(images / "0.png"), str(images / "1.png"))))
    later = (
        Turn("user", "<image>\nand?"),
        Turn("assistant", "no"),
        Turn("user", "<image>\nthis?"),
        Turn("assistant", "yes"),
    )
    rows.append(Conversation("later", later, (str(images / "2.png"), str(images / "3.png"))))
    rows += [
        Conversation(f"text {i}", (Turn("user", "what is a lung?"), Turn("assistant", "an organ")))
        for i in range(2)
    ]
    return rows


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.build(folder / f"tiny-{kind}", kind, *how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def runs(
    bases: dict[str, Path], conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, StageAdapter]]:
    """The three stages on a checkpoint of each class."""
    folder = tmp_path_factory.mktemp("runs")
    data = dict.fromkeys(("align", "instruct", "vqa"), conversations)
    return {
        kind: curriculum_finetune(
            base, data, folder / kind, curriculum=THREE, eval_data={"vqa": conversations}, eval_steps=2
        )
        for kind, base in bases.items()
    }


def logits(model: torch.nn.Module, processor: object, conversations: list[Conversation]) -> torch.Tensor:
    batch = PackedCollator(processor, layout="padded")(conversations)
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]

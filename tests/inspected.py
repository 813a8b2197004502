"""A checkpoint of configuration and processor alone, and data, for tests of `inspect`."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from tiny import build

from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage
from llavamed_peft.preview.inspect import inspect

SHORT = Schedule(epochs=1.5, learning_rate=1e-3, global_batch=2, max_length=64)

CURRICULUM = Curriculum(
    (
        Stage("align", "projector", replace(SHORT, global_batch=8)),
        Stage("instruct", "lora", SHORT, LoraSpec(rank=4, alpha=8, dropout=0)),
        Stage("vqa", "lora", SHORT, LoraSpec(rank=4, alpha=8, dropout=0)),
    )
)


def row(name, image, *said):
    turns = [
        {"from": "gpt" if position % 2 else "human", "value": text} for position, text in enumerate(said)
    ]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


ROWS = [
    row("q1", "a.png", "<image>\nwhat is it ?", "a chest x-ray\nof the left lung", "normal ?", "yes"),
    row("q2", "nope.png", "<image>\nwhat ?", "no"),
    row("q3", "b.png", "<image>\nis the heart normal ?", "no"),
    row("q4", None, "what is a lung ?", "the lung is in the chest"),
    row("q5", "a.png", "<image>\nwhat ?", " "),
    row("q6", "a.png", "<image>\nwhat ?", "the lung " * 50),
    row("q7", "a.png", "<image>\nwhat ?", "yes"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of configuration and processor alone, data, and images."""
    folder = tmp_path_factory.mktemp("inspected")
    base = build(folder / "tiny-llava")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    (base / "model.safetensors").rename(folder / "weights.safetensors")
    Image.new("RGB", (60, 40), "gray").save(folder / "a.png")
    Image.new("RGB", (40, 60), "gray").save(folder / "b.png")
    (folder / "train.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return folder


def said(place, data=None, curriculum=CURRICULUM, **options):
    data = {"align": [place / "train.json"]} if data is None else data
    return "\n".join(inspect(place / "tiny-llava", data, curriculum=curriculum, **options)) + "\n"

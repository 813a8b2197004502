"""Conversations with much in common, models to train on them, and a batch's loss and gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llavamed_peft import Conversation, LoraSpec, Turn
from llavamed_peft.modeling.load import load_checkpoint
from llavamed_peft.modeling.scopes import adapter_config, attach
from llavamed_peft.modeling.tensors import set_dtypes
from llavamed_peft.modeling.tower import freeze_tower

KINDS = {"llava": (), "vipllava": (), "llava_next": ("mistral",), "llava_onevision": ("qwen2", "siglip", -1)}


def draw_images(folder: Path) -> dict[str, str]:
    """a, b and c of three shapes; `again` is a's content under another name."""
    generator = np.random.default_rng(0)
    for name, size in {"a": (60, 60), "b": (40, 120), "c": (120, 50)}.items():
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "again.png")
    return {name: str(folder / f"{name}.png") for name in ("a", "b", "c", "again")}


def asked(number: int, images: tuple[str, ...], *words: str) -> Conversation:
    """One conversation: question, answer, question, answer, …; the first question shows the images."""
    shown = "<image>\n" * len(images)
    turns = [
        Turn(("user", "assistant")[i % 2], (shown if i == 0 else "") + text) for i, text in enumerate(words)
    ]
    return Conversation(str(number), tuple(turns), images, f"d.json:{number}")


def draw_conversations(images: dict[str, str]) -> list[Conversation]:
    a, b, c, again = (images[name] for name in ("a", "b", "c", "again"))
    rows = [
        ((a,), "what is in the image ?", "the heart"),
        ((a,), "what is in the lung ?", "a chest x-ray shows the normal lung"),
        ((b,), "is it left ?", "no"),
        ((again,), "what is in the image ?", "the lung"),
        ((a,), "what is in the image ?", "the heart"),  # a duplicate counts twice
        ((a,), "what is in the image ?", "the heart", "is it normal ?", "yes"),
        ((a, b), "what is left ?", "the heart"),
        ((a, c), "what is left ?", "no heart in the image"),
        ((a, a), "what is left ?", "the lung"),
        ((), "what is a lung ?", "an organ"),
        ((), "what is a heart ?", "an organ of the chest"),
    ]
    return [asked(number, *row) for number, row in enumerate(rows, start=1)]


def trainable(
    base: Path, trains: str = "full", quantization: str | None = None, dropout: float = 0.0
) -> tuple[object, object]:
    """A model that a stage could train, all of it computed in fp32, and its processor."""
    model, processor = load_checkpoint(base, quantization, "float32")
    if trains == "full":
        freeze_tower(model)
        return model.train(), processor
    torch.manual_seed(0)
    spec = LoraSpec(rank=4, alpha=8, dropout=dropout)
    model = attach(model, adapter_config(model, spec if trains == "lora" else None), trains)
    set_dtypes(model, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    freeze_tower(model)
    return model.train(), processor


def loss_and_gradients(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


Learnt = tuple[float, dict[str, torch.Tensor]]


def assert_same(one: Learnt, other: Learnt, loss: float = 1e-6, gradient: float = 1e-5) -> None:
    """Relative differences of the loss, and of each gradient as a whole."""
    assert one[0] == pytest.approx(other[0], rel=loss)
    assert set(one[1]) == set(other[1]) and one[1]
    for name, wanted in other[1].items():
        error = (one[1][name] - wanted).norm() / wanted.norm()
        assert error < gradient or wanted.norm() == one[1][name].norm() == 0, (name, error)


def random_ends(tokens: int, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """`ends` of random trees."""
    generator = np.random.default_rng(seed)
    ends = np.zeros((rows, tokens), dtype=np.int64)
    for row in ends:
        spans = [(0, tokens)]
        while spans:
            begin, end = spans.pop()
            while begin < end:
                stop = int(generator.integers(begin + 1, end + 1))
                own = int(generator.integers(begin + 1, stop + 1))
                row[begin:own] = stop
                spans.append((own, stop))
                begin = stop
    return torch.from_numpy(ends)

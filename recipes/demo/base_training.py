"""Training the base from nothing: the tower first warms up on shapes, then everything trains together."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import torch
from base_batches import RowBuilder, answer, collate
from base_evaluation import evaluate
from base_model import GRID, PATCH, WIDTH, pixels_of
from clinic_scenes import clinic_scene
from general_scenes import COLORS, SHAPES, general_scene
from scene import Scene
from scenes import FIRST_SEED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

PROBE_WEIGHT = 0.3
SIMPLE_SHARE = 0.2  # of the steps, from the first on, with one shape in each scene


class PatchProbe(nn.Module):
    """A dense task for the vision tower: which shape, colour and size are in each patch, and the patch's
    own pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.ModuleList(nn.Linear(WIDTH, 1 + count) for count in (len(SHAPES), len(COLORS), 2))
        self.pixels = nn.Linear(WIDTH, 3 * (PATCH // 2) ** 2)

    def forward(self, patches_NPC: Tensor, pixels_N3HW: Tensor, scenes: Sequence[Scene]) -> Tensor:
        coarse = F.unfold(F.avg_pool2d(pixels_N3HW, 2), kernel_size=PATCH // 2, stride=PATCH // 2).transpose(
            1, 2
        )
        loss = 4 * F.mse_loss(self.pixels(patches_NPC), coarse)
        for head, label_NP in zip(
            self.classes, torch.stack([self._labels(scene) for scene in scenes], dim=1), strict=True
        ):
            weight = torch.ones(head.out_features)
            weight[0] = 0.15  # most patches show nothing
            loss = loss + F.cross_entropy(head(patches_NPC).flatten(0, 1), label_NP.flatten(), weight=weight)
        return loss

    @staticmethod
    def _labels(scene: Scene) -> Tensor:
        """Shape, colour and size of what is in each patch, [3, patches]; 0 for nothing."""
        labels = torch.zeros(3, GRID, GRID, dtype=torch.long)
        centres = torch.arange(GRID) * PATCH + PATCH // 2
        for shape in scene.shapes:
            rows, columns = ((centres - middle).abs() < shape.radius + 2 for middle in (shape.y, shape.x))
            values = torch.tensor(
                [SHAPES.index(shape.name), list(COLORS).index(shape.color), int(shape.large)]
            )
            labels[:, rows[:, None] & columns] = 1 + values[:, None]
        return labels.flatten(1)


def adamw(learning_rate: float, *modules: nn.Module) -> torch.optim.AdamW:
    weights = [weight for module in modules for weight in module.parameters()]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.05},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def warm_up_tower(
    model: LlavaForConditionalGeneration,
    probe: PatchProbe,
    processor: LlavaProcessor,
    seeds: Iterator[int],
    steps: int,
) -> None:
    """The vision tower alone on the dense task."""
    optimizer = adamw(2e-3, model.model.vision_tower, probe)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    for step in range(1, steps + 1):
        scenes = [general_scene(next(seeds)) for _ in range(32)]
        pixels = pixels_of(processor, scenes)
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        loss = probe(hidden[model.config.vision_feature_layer][:, 1:], pixels, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"vision tower, step {step} of {steps}: dense loss {loss.item():.3f}", flush=True)


def scene_to_look_at(seeds: Iterator[int], at_most: int) -> Scene:
    """The next general scene with no more shapes than that."""
    return next(scene for scene in map(general_scene, seeds) if len(scene.shapes) <= at_most)


def train(
    model: LlavaForConditionalGeneration,
    probe: PatchProbe,
    processor: LlavaProcessor,
    seeds: Iterator[int],
    steps: int,
) -> None:
    """The whole model on captions, questions and dialogues; a step takes six general scenes seen and two
    scenes told in words."""
    rows_of = RowBuilder(processor)
    rng = random.Random(0)
    watched = [general_scene(FIRST_SEED["general_heldout"] + 50_000 + number) for number in range(60)]
    optimizer = adamw(1.5e-3, model, probe)
    schedule = LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, max(0.03, (1 - step / steps) / 0.3))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        seen = [scene_to_look_at(seeds, at_most=1 if step <= steps * SIMPLE_SHARE else 4) for _ in range(6)]
        told = [
            clinic_scene(next(seeds)) if rng.random() < 0.6 else general_scene(next(seeds)) for _ in range(2)
        ]
        rows = [rows_of.sample(scene, rng, seen=True) for scene in seen]
        rows += [rows_of.sample(scene, rng, seen=False) for scene in told]
        batch = collate(rows, pixels_of(processor, seen))
        answers = answer(model, batch)
        loss = (answers.loss_S * answers.weight_S).sum() / answers.weight_S.sum()
        total = loss + PROBE_WEIGHT * probe(answers.patches_NPC, batch.pixels_N3HW, seen)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            result = evaluate(model, processor, watched)
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {step} of {steps}, {minutes:.1f} min: loss {loss.item():.3f}; held-out general "
                f"{result}",
                flush=True,
            )

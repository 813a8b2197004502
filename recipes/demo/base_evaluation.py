"""How well the base answers held-out scenes, with their own images and with others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from base_batches import RowBuilder, answer, collate
from base_model import pixels_of
from clinic_scenes import clinic_scene
from general_scenes import general_scene
from scene import Scene
from scenes import FIRST_SEED
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


@dataclass(frozen=True, slots=True)
class Result:
    """Shares of questions answered exactly, by answer type and by kind; mean token losses of captions and
    dialogues."""

    closed: float
    open: float
    caption: float
    dialogue: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        answers = f"closed {self.closed:.3f}, open {self.open:.3f}"
        return f"{answers}, caption loss {self.caption:.3f}, dialogue loss {self.dialogue:.3f}"


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    shuffled: bool = False,
) -> Result:
    """All texts of the scenes; an answer is right if each of its tokens, the end included, is the likeliest
    after the true ones.

    Args:
        shuffled: every scene's texts go with the next scene's image, to see how much is known without
            looking.
    """
    rows_of = RowBuilder(processor)
    rows = [rows_of.everything(scene) for scene in scenes]
    images = [*scenes[1:], scenes[0]] if shuffled else scenes
    right: dict[str, list[bool]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    model.eval()
    for begin in range(0, len(rows), 20):
        some = rows[begin : begin + 20]
        answers = answer(model, collate(some, pixels_of(processor, images[begin : begin + 20])))
        for row in range(len(some)):
            for index, branch in enumerate(some[row].branches, start=1):
                here = (answers.row_S == row) & (answers.branch_S == index)
                right[branch.kind].append(bool(answers.right_S[here].all()))
                losses[branch.kind].extend(answers.loss_S[here].tolist())
                if branch.about:
                    right[f"{branch.kind} {branch.about}"].append(right[branch.kind][-1])
    model.train()
    by_kind = {kind: mean(values) for kind, values in sorted(right.items()) if " " in kind}
    return Result(
        mean(right["closed"]), mean(right["open"]), mean(losses["caption"]), mean(losses["dialogue"]), by_kind
    )


def print_table(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    general = [general_scene(FIRST_SEED["general_heldout"] + number) for number in range(250)]
    clinic = [clinic_scene(FIRST_SEED["heldout"] + number) for number in range(250)]
    print(
        "\n| held-out scenes | closed (guessing .500) | open | caption loss | dialogue loss "
        "|\n|---|---|---|---|---|"
    )
    sets = (
        ("general", general, False),
        ("general, images shuffled", general, True),
        ("clinic, never seen", clinic, False),
    )
    results = {}
    for name, scenes, shuffled in sets:
        result = evaluate(model, processor, scenes, shuffled)
        print(
            f"| {name} | {result.closed:.3f} | {result.open:.3f} | {result.caption:.3f} | "
            f"{result.dialogue:.3f} |",
            flush=True,
        )
        results[name] = result
    print(
        "\nHeld-out general scenes by kind: "
        + ", ".join(f"{kind} {x:.2f}" for kind, x in results["general"].by_kind.items())
    )

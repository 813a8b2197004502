"""Draw the demo's world: images with the texts that go with them, from a seed.

Two kinds of scenes, 80 x 80 pixels each. *General scenes* are coloured shapes on a plain background: what the
tiny base checkpoint has seen. The *clinic* is drawn in the manner of five modalities (chest X-ray, CT, brain
MRI, histology, gross specimen): what the curriculum teaches. A scene is a value: its image, a caption,
questions with answers, a dialogue.

    scene = clinic_scene(seed=7)
    scene.image.show(), scene.caption, scene.questions, scene.dialogue
    write_dataset("data/")     # PNG files and LLaVA JSON files for align, instruct and vqa, and held-out sets

A seed gives the same scene on every machine: `random.Random` decides everything, and shapes are drawn at
whole pixels. Every closed question is followed by its opposite, about the same image and with the other
answer, so that neither the words of a question nor a liking for "yes" helps: guessing scores one half.

What is left out: anatomy. These are drawings, not medical images; nothing learnt from them says anything
about a patient, and *left* is the left of the image, not the patient's. There is little to say about so
simple a world: captions of held-out images occur in training too, the images do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from clinic_scenes import clinic_scene
from general_scenes import general_scene
from scene import INSTRUCTIONS, Scene, Turns

# First seed of each set. The sets are disjoint: each may take 100,000 seeds, the base's training all from
# 1,000,000 on.
FIRST_SEED = {
    "align": 0,
    "instruct": 100_000,
    "vqa": 200_000,
    "heldout": 300_000,
    "general_heldout": 400_000,
    "base": 1_000_000,
}

SEEDS_OF_A_CLINIC = 100_000_000


def write_dataset(
    folder: str | Path,
    seed: int = 0,
    *,
    align: int = 1_500,
    instruct: int = 1_000,
    vqa: int = 1_500,
    heldout: int = 250,
) -> dict[str, Path]:
    """Draw the curriculum's data: PNG files under `images/` and LLaVA JSON files.

    Args:
        folder: where to; made if it is not there.
        seed: which clinic; two seeds have no scene in common, nor has any with those that the base was
            trained on.
        align: clinic images with one caption each, asked for by an instruction.
        instruct: clinic images with one dialogue of two turns each.
        vqa: clinic images with all their questions, one row for each question.
        heldout: clinic images that no stage trains on, with caption, dialogue and questions; and as many
            general scenes with questions, to see what the base forgets.

    Returns:
        File of each set by name: `align`, `instruct`, `vqa`, `align_heldout`, `instruct_heldout`,
            `vqa_heldout`,
        `general_heldout`. Rows of the last two also carry `answer_type` (`open` or `closed`).
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, object]]] = {}

    def draw(set_name: str, count: int, scene_of: Callable[[int], Scene]) -> Iterable[tuple[str, Scene]]:
        for number in range(count):
            scene = scene_of(seed * SEEDS_OF_A_CLINIC + FIRST_SEED[set_name] + number)
            name = f"{set_name}-{number:05d}"
            scene.image.save(folder / "images" / f"{name}.png")
            yield name, scene

    rows["align"] = [_caption_row(name, scene) for name, scene in draw("align", align, clinic_scene)]
    rows["instruct"] = [
        _row(name, name, scene.dialogue) for name, scene in draw("instruct", instruct, clinic_scene)
    ]
    rows["vqa"] = [
        row for name, scene in draw("vqa", vqa, clinic_scene) for row in _question_rows(name, scene)
    ]

    unseen = list(draw("heldout", heldout, clinic_scene))
    general = draw("general_heldout", heldout, general_scene)
    rows["align_heldout"] = [_caption_row(name, scene) for name, scene in unseen]
    rows["instruct_heldout"] = [_row(name, name, scene.dialogue) for name, scene in unseen]
    rows["vqa_heldout"] = [
        row for name, scene in unseen for row in _question_rows(name, scene, with_answer_type=True)
    ]
    rows["general_heldout"] = [
        row for name, scene in general for row in _question_rows(name, scene, with_answer_type=True)
    ]

    files = {set_name: folder / f"{set_name}.json" for set_name in rows}
    for set_name, file in files.items():
        file.write_text(json.dumps(rows[set_name], indent=1), encoding="utf-8")
    return files


def _row(row_id: str, image: str, turns: Turns) -> dict[str, object]:
    """A row of a LLaVA JSON file; the image is in the first turn."""
    conversations = []
    for number, (request, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": request if number else f"<image>\n{request}"})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": row_id, "image": f"images/{image}.png", "conversations": conversations}


def _caption_row(name: str, scene: Scene) -> dict[str, object]:
    instruction = INSTRUCTIONS[int(name.rsplit("-", 1)[1]) % len(INSTRUCTIONS)]
    return _row(name, name, ((instruction, scene.caption),))


def _question_rows(name: str, scene: Scene, with_answer_type: bool = False) -> list[dict[str, object]]:
    rows = []
    for number, question in enumerate(scene.questions):
        row = _row(f"{name}-{number}", name, ((question.question, question.answer),))
        rows.append(row | {"answer_type": question.answer_type} if with_answer_type else row)
    return rows

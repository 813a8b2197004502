"""The clinic: drawings in the manner of five modalities, what the curriculum teaches.

Left out: anatomy. These are drawings, not medical images; nothing learnt from them says anything about a
patient, and *left* is the left of the image, not the patient's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from scene import (
    Canvas,
    Color,
    Scene,
    SceneQuestion,
    another,
    article,
    gray,
    open_question,
    presence,
    question_pair,
    vary,
)

_LESIONS = 0.8  # share of the CT and MRI scans with a lesion


def _chest_xray(rng: random.Random) -> Scene:
    finding = rng.choice(("", "nodule", "nodule", "effusion", "effusion"))
    side = rng.choice(("left", "right"))
    heart = rng.choice(("large", "normal"))

    canvas = Canvas(gray(rng, 120, 150), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    lung = rng.randint(25, 55)
    for x in (23, 57):
        canvas.ellipse(x, 40, rng.randint(11, 13), rng.randint(25, 28), (lung, lung, lung))
        for y in range(18, 64, 9):
            canvas.arc(x, y + 2, 13, 6, 200, 340, (lung + 30, lung + 30, lung + 30))
    bone = gray(rng, 175, 200)
    canvas.ellipse(40, 40, 4, 32, bone)
    canvas.ellipse(42, 52, rng.randint(13, 15) if heart == "large" else rng.randint(6, 8), 10, bone)
    x = 21 if side == "left" else 59
    if finding == "nodule":
        canvas.disc(x + rng.randint(-3, 2), rng.randint(24, 40), rng.randint(4, 5), gray(rng, 200, 240))
    elif finding == "effusion":
        top = rng.randint(48, 54)
        canvas.rectangle(x, (top + 70) / 2, 12, (70 - top) / 2, gray(rng, 195, 225))

    lungs = f"{article(finding)} in the {side} lung" if finding else "clear lungs"
    caption = f"A chest X-ray showing {lungs} and a {heart} heart."
    questions = _modality_pair(rng, "chest X-ray")
    if not finding:
        questions += presence(
            "finding",
            True,
            "Are the lungs clear?",
            f"Is there {article(rng.choice(('nodule', 'effusion')))}?",
        )
    elif rng.random() < 0.5:
        questions += presence("finding", True, f"Is there {article(finding)}?", "Are the lungs clear?")
    else:
        other = another(rng, finding, ("nodule", "effusion"))
        questions += question_pair("finding", "Is there {}?", article(finding), article(other))
    questions += question_pair("heart", "Is the heart {}?", heart, another(rng, heart, ("large", "normal")))
    if finding:
        questions += _side_pair(finding, side)
    questions += [open_question("modality", "Which modality is this?", "chest X-ray")]
    questions += [open_question("finding", "What is the main finding?", finding or "clear lungs")]
    questions += [open_question("heart", "How large is the heart?", heart)]
    turns = [
        ("Please tell me about the lungs.", f"There is {lungs}." if finding else "The lungs are clear."),
        ("Please tell me about the heart.", f"The heart is {heart}."),
    ]
    if finding:
        questions += [open_question("side", f"Which side is the {finding} on?", side)]
        turns.append((f"Please tell me where the {finding} is.", f"The {finding} is on the {side} side."))
    return _clinic_scene(rng, canvas, caption, questions, turns, "chest X-ray")


def _ct_scan(rng: random.Random) -> Scene:
    organs = {"liver": (23, 34), "spleen": (60, 32), "kidney": rng.choice(((27, 57), (53, 57)))}
    organ = rng.choice(tuple(organs))
    lesion = rng.random() < _LESIONS
    look = rng.choice(("bright", "dark"))

    canvas = Canvas(gray(rng, 0, 12), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    canvas.ellipse(40, 40, rng.randint(34, 37), rng.randint(26, 30), gray(rng, 75, 90))
    tissue = gray(rng, 125, 145)
    canvas.ellipse(23, 34, 15, 14, tissue)
    canvas.ellipse(60, 32, 9, 11, tissue)
    canvas.ellipse(27, 57, 7, 6, tissue)
    canvas.ellipse(53, 57, 7, 6, tissue)
    canvas.disc(40, 60, 5, (235, 235, 235))
    if lesion:
        x, y = organs[organ]
        color = gray(rng, 215, 245) if look == "bright" else gray(rng, 10, 40)
        canvas.disc(x + rng.randint(-2, 2), y + rng.randint(-1, 1), rng.randint(4, 5), color)

    shown = f"a {look} lesion in the {organ}" if lesion else "no lesion"
    questions = _modality_pair(rng, "CT scan") + _lesion_pair(rng, lesion)
    turns = [("Please tell me about the scan.", f"The CT scan shows {shown}.")]
    if lesion:
        questions += question_pair("organ", "Is the lesion in the {}?", organ, another(rng, organ, organs))
        questions += question_pair("look", "Is the lesion {}?", look, another(rng, look, ("bright", "dark")))
        questions += [
            open_question("organ", "Which organ is the lesion in?", organ),
            open_question("look", "How bright is the lesion?", look),
        ]
        turns.append(("Please tell me where the lesion is.", f"The lesion is in the {organ}."))
        turns.append(("Please tell me about the lesion.", f"The lesion is {look}."))
    questions += [open_question("modality", "Which modality is this?", "CT scan")]
    return _clinic_scene(
        rng, canvas, f"A CT scan of the abdomen showing {shown}.", questions, turns, "CT scan"
    )


def _brain_mri(rng: random.Random) -> Scene:
    lesion = rng.random() < _LESIONS
    side = rng.choice(("left", "right"))
    size = rng.choice(("large", "small"))

    canvas = Canvas(gray(rng, 0, 10), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    width, height = rng.randint(26, 29), rng.randint(32, 35)
    canvas.ellipse(40, 40, width, height, gray(rng, 170, 200))
    canvas.ellipse(40, 40, width - 3, height - 3, gray(rng, 95, 120))
    fluid = gray(rng, 25, 40)
    canvas.ellipse(36, 38, 2, rng.randint(8, 10), fluid)
    canvas.ellipse(44, 38, 2, rng.randint(8, 10), fluid)
    canvas.rectangle(40, 40, 0, 30, gray(rng, 55, 65))
    if lesion:
        away = rng.randint(10, 15)
        radius = rng.randint(7, 8) if size == "large" else 3
        canvas.disc(
            40 - away if side == "left" else 40 + away, rng.randint(23, 57), radius, gray(rng, 215, 250)
        )

    shown = f"a {size} lesion on the {side} side" if lesion else "no lesion"
    questions = _modality_pair(rng, "MRI scan") + _lesion_pair(rng, lesion)
    turns = [("Please tell me about the scan.", f"The MRI scan shows {shown}.")]
    if lesion:
        questions += _side_pair("lesion", side)
        questions += question_pair("size", "Is the lesion {}?", size, another(rng, size, ("large", "small")))
        questions += [
            open_question("side", "Which side is the lesion on?", side),
            open_question("size", "How large is the lesion?", size),
        ]
        turns.append(("Please tell me where the lesion is.", f"The lesion is on the {side} side."))
        turns.append(("Please tell me about the lesion.", f"The lesion is {size}."))
    questions += [open_question("modality", "Which modality is this?", "MRI scan")]
    return _clinic_scene(
        rng, canvas, f"An MRI scan of the brain showing {shown}.", questions, turns, "MRI scan"
    )


def _histology(rng: random.Random) -> Scene:
    mitoses = rng.choice(("few", "many"))
    glands = rng.random() < 0.5

    canvas = Canvas(vary(rng, (238, 185, 205), 10))
    for _ in range(rng.randint(25, 40)):
        canvas.disc(rng.randint(2, 78), rng.randint(2, 78), 2, vary(rng, (175, 120, 190), 8))
    if glands:
        for x in (rng.randint(15, 32), rng.randint(48, 65)):
            canvas.ring(
                x, rng.randint(15, 65), rng.randint(9, 13), (120, 60, 150), width=3, fill=(250, 240, 245)
            )
    for _ in range(rng.randint(11, 16) if mitoses == "many" else rng.randint(1, 3)):
        canvas.ellipse(rng.randint(4, 76), rng.randint(4, 76), 3, 2, vary(rng, (55, 15, 85), 10))

    caption = f"A histology slide showing {mitoses} mitoses and {'glands' if glands else 'no glands'}."
    questions = _modality_pair(rng, "histology slide")
    questions += question_pair(
        "mitoses", "Are there {} mitoses?", mitoses, another(rng, mitoses, ("few", "many"))
    )
    questions += presence("glands", glands, "Are there glands?", "Are glands absent?")
    questions += [open_question("modality", "Which modality is this?", "histology slide")]
    questions += [open_question("mitoses", "How many mitoses are there?", mitoses)]
    turns = [
        ("Please tell me about the mitoses.", f"There are {mitoses} mitoses."),
        ("Please tell me about the glands.", "There are glands." if glands else "There are no glands."),
    ]
    return _clinic_scene(rng, canvas, caption, questions, turns, "histology slide")


_TISSUE_COLORS: dict[str, Color] = {
    "red": (170, 45, 45),
    "yellow": (215, 180, 80),
    "brown": (120, 75, 50),
    "pale": (225, 205, 195),
}


def _gross_specimen(rng: random.Random) -> Scene:
    color = rng.choice(tuple(_TISSUE_COLORS))
    size = rng.choice(("large", "small"))
    necrosis = rng.random() < 0.5

    canvas = Canvas(vary(rng, (60, 110, 160)))
    x, y = rng.randint(34, 46), rng.randint(34, 46)
    radius = rng.randint(22, 27) if size == "large" else rng.randint(10, 14)
    outline = []
    for step in range(14):
        angle = step * math.tau / 14
        across, down = radius * rng.uniform(0.85, 1.1), radius * rng.uniform(0.75, 1.0)
        outline.append((x + across * math.cos(angle), y + down * math.sin(angle)))
    canvas.polygon(outline, vary(rng, _TISSUE_COLORS[color]))
    if necrosis:
        for _ in range(3):
            canvas.disc(
                x + radius * rng.uniform(-0.45, 0.45), y + radius * rng.uniform(-0.4, 0.4), 3, (15, 10, 10)
            )
    canvas.rectangle(14, 75, 10, 1, (240, 240, 240))  # the scale

    caption = (
        f"A gross specimen showing a {size} {color} organ with {'necrosis' if necrosis else 'no necrosis'}."
    )
    questions = _modality_pair(rng, "gross specimen")
    questions += question_pair("size", "Is the specimen {}?", size, another(rng, size, ("large", "small")))
    questions += question_pair("color", "Is the specimen {}?", color, another(rng, color, _TISSUE_COLORS))
    questions += presence("necrosis", necrosis, "Is there necrosis?", "Is necrosis absent?")
    questions += [open_question("modality", "Which modality is this?", "gross specimen")]
    questions += [open_question("size", "How large is the specimen?", size)]
    questions += [open_question("color", "What color is the specimen?", color)]
    turns = [
        ("Please tell me about the specimen.", f"It is a {size} {color} organ."),
        ("Please tell me about necrosis.", "There is necrosis." if necrosis else "There is no necrosis."),
    ]
    return _clinic_scene(rng, canvas, caption, questions, turns, "gross specimen")


MODALITIES: dict[str, Callable[[random.Random], Scene]] = {
    "chest X-ray": _chest_xray,
    "CT scan": _ct_scan,
    "MRI scan": _brain_mri,
    "histology slide": _histology,
    "gross specimen": _gross_specimen,
}


def clinic_scene(seed: int) -> Scene:
    """A drawing in the manner of one of the five modalities, with its findings."""
    rng = random.Random(seed)
    return MODALITIES[rng.choice(tuple(MODALITIES))](rng)


def _clinic_scene(
    rng: random.Random,
    canvas: Canvas,
    caption: str,
    questions: list[SceneQuestion],
    turns: list[tuple[str, str]],
    modality: str,
) -> Scene:
    """Noise over the drawing, and two turns out of those that fit it."""
    turns = [*turns, ("Please tell me about the modality.", f"This is {article(modality)}.")]
    return Scene(
        canvas.with_noise(rng, rng.randint(2, 12)), caption, tuple(questions), tuple(rng.sample(turns, 2))
    )


def _modality_pair(rng: random.Random, modality: str) -> list[SceneQuestion]:
    return question_pair(
        "modality", "Is this {}?", article(modality), article(another(rng, modality, MODALITIES))
    )


def _side_pair(thing: str, side: str) -> list[SceneQuestion]:
    return question_pair("side", f"Is the {thing} on the {{}}?", side, "right" if side == "left" else "left")


def _lesion_pair(rng: random.Random, lesion: bool) -> list[SceneQuestion]:
    """Asked as often of scans with a lesion as of those without, so that the words do not give the answer
    away."""
    if lesion and rng.random() >= (1 - _LESIONS) / _LESIONS:
        return []
    return presence("lesion", lesion, "Is there a lesion?", "Is the scan normal?")

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
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageChops, ImageDraw

IMAGE_SIZE = 80
INSTRUCTIONS = ("Describe the image.", "Please describe the image.", "Give a short description of the image.")

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

Color = tuple[int, int, int]
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question about a scene: its words, the true answer, whether it is closed (yes or no), and what it
    asks after."""

    question: str
    answer: str
    answer_type: Literal["open", "closed"]
    kind: str


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape of a general scene: what it is called, and the centre and radius, in pixels, at which it
    stands."""

    name: str
    color: str
    large: bool
    x: int
    y: int
    radius: int

    @property
    def size(self) -> str:
        return "large" if self.large else "small"

    @property
    def side(self) -> str:
        return "left" if self.x < IMAGE_SIZE // 2 else "right"

    @property
    def place(self) -> str:
        return f"{'upper' if self.y < IMAGE_SIZE // 2 else 'lower'} {self.side}"


@dataclass(frozen=True, slots=True)
class Scene:
    """An image (RGB) and its texts.

    Args:
        image: 80 x 80 pixels.
        caption: one sentence.
        questions: closed questions first, each followed by its opposite, then the open ones.
        dialogue: two (request, answer) turns, answers in whole sentences.
        shapes: what a general scene shows, for the base's dense training; empty in the clinic.
    """

    image: Image.Image
    caption: str
    questions: tuple[SceneQuestion, ...]
    dialogue: Turns
    shapes: tuple[Shape, ...] = ()


# ----------------------------------------------------------------------------------------------------
# drawing


class _Canvas:
    """An image under the brush; everything is drawn moved by `shift`, at whole pixels."""

    def __init__(self, color: Color, shift: tuple[int, int] = (0, 0)) -> None:
        self.image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), color)
        self._draw = ImageDraw.Draw(self.image)
        self._shift = shift

    def _box(self, x: float, y: float, half_width: float, half_height: float) -> list[int]:
        x, y = x + self._shift[0], y + self._shift[1]
        return [round(x - half_width), round(y - half_height), round(x + half_width), round(y + half_height)]

    def ellipse(self, x: float, y: float, half_width: float, half_height: float, color: Color) -> None:
        self._draw.ellipse(self._box(x, y, half_width, half_height), fill=color)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        self.ellipse(x, y, radius, radius, color)

    def ring(
        self, x: float, y: float, radius: float, color: Color, width: int, fill: Color | None = None
    ) -> None:
        self._draw.ellipse(self._box(x, y, radius, radius), fill=fill, outline=color, width=width)

    def rectangle(self, x: float, y: float, half_width: float, half_height: float, color: Color) -> None:
        self._draw.rectangle(self._box(x, y, half_width, half_height), fill=color)

    def polygon(self, points: Iterable[tuple[float, float]], color: Color) -> None:
        self._draw.polygon(
            [(round(x + self._shift[0]), round(y + self._shift[1])) for x, y in points], fill=color
        )

    def arc(
        self, x: float, y: float, half_width: float, half_height: float, start: int, end: int, color: Color
    ) -> None:
        self._draw.arc(self._box(x, y, half_width, half_height), start, end, fill=color)

    def with_noise(self, rng: random.Random, strength: int) -> Image.Image:
        """The image with a grey value added to each pixel, evenly drawn from -strength to +strength."""
        levels = [value * 2 * strength // 255 for value in range(256)]
        grain = Image.frombytes("L", self.image.size, rng.randbytes(IMAGE_SIZE * IMAGE_SIZE)).point(levels)
        return ImageChops.add(self.image, Image.merge("RGB", [grain] * 3), offset=-strength)


def _gray(rng: random.Random, low: int, high: int) -> Color:
    level = rng.randint(low, high)
    return (level, level, level)


def _vary(rng: random.Random, color: Color, by: int = 14) -> Color:
    red, green, blue = (min(255, max(0, value + rng.randint(-by, by))) for value in color)
    return (red, green, blue)


# ----------------------------------------------------------------------------------------------------
# words


def _article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"an {noun}" if noun[0] in "aeiou" or noun.startswith("MRI") else f"a {noun}"


def _pair(kind: str, words: str, true: str, false: str) -> list[SceneQuestion]:
    """A closed question and its opposite: `words` with `{}` filled once so that it is true, once so that it
    is false."""
    return [
        SceneQuestion(words.format(true), "yes", "closed", kind),
        SceneQuestion(words.format(false), "no", "closed", kind),
    ]


def _presence(kind: str, present: bool, question: str, opposite: str) -> list[SceneQuestion]:
    """Two closed questions after one thing, of which one is true if it is present, the other if it is not."""
    answers = ("yes", "no") if present else ("no", "yes")
    return [
        SceneQuestion(words, answer, "closed", kind)
        for words, answer in zip((question, opposite), answers, strict=True)
    ]


def _open(kind: str, question: str, answer: str) -> SceneQuestion:
    return SceneQuestion(question, answer, "open", kind)


def _other(rng: random.Random, value: str, values: Iterable[str]) -> str:
    """One of `values` that is not `value`."""
    return rng.choice([candidate for candidate in values if candidate != value])


# ----------------------------------------------------------------------------------------------------
# general scenes

COLORS: dict[str, Color] = {
    "red": (215, 45, 45),
    "green": (50, 165, 70),
    "blue": (50, 85, 210),
    "yellow": (235, 210, 50),
    "purple": (140, 60, 170),
    "orange": (240, 140, 40),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "pink": (240, 160, 185),
    "brown": (125, 80, 50),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "bar")
BACKGROUNDS = ("white", "black", "gray", "pink", "blue", "brown")
COUNTS = ("one", "two", "three", "four")
_TOO_ALIKE = {"black": "brown", "brown": "black"}
_DOTTED = 0.35  # share of the general scenes with dots


def general_scene(seed: int) -> Scene:
    """One to four coloured shapes, each in a quarter of a plain background, some over few or many dots."""
    rng = random.Random(seed)
    background = rng.choice(BACKGROUNDS)
    colors = [color for color in COLORS if color not in (background, _TOO_ALIKE.get(background))]
    canvas = _Canvas(_vary(rng, COLORS[background]))

    dots, dot_color = "", ""
    if rng.random() < _DOTTED:
        dots, dot_color = rng.choice(("few", "many")), rng.choice(colors)
        colors.remove(dot_color)
        for _ in range(rng.randint(24, 40) if dots == "many" else rng.randint(4, 9)):
            canvas.disc(rng.randint(2, 78), rng.randint(2, 78), rng.choice((1, 2)), COLORS[dot_color])

    shapes: list[Shape] = []
    quarters = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for column, row in rng.sample(quarters, rng.choice((1, 1, 2, 2, 3, 4))):
        large = rng.random() < 0.5
        radius = rng.randint(11, 15) if large else rng.randint(6, 8)
        x, y = (40 * half + rng.randint(radius + 1, 39 - radius) for half in (column, row))
        taken = {(shape.color, shape.name) for shape in shapes}
        color, name = rng.choice([(c, n) for c in colors for n in SHAPES if (c, n) not in taken])
        shapes.append(Shape(name, color, large, x, y, radius))
        _draw_shape(canvas, shapes[-1], _vary(rng, COLORS[color], 12))
    shapes.sort(key=lambda shape: (shape.y >= 40, shape.x))

    caption = " and ".join(
        f"a {shape.size} {shape.color} {shape.name} in the {shape.place}" for shape in shapes
    )
    caption += f" with {dots} {dot_color} dots" if dots else ""
    caption = f"A{caption[1:]} on a {background} background."
    questions = _general_questions(rng, shapes, colors, dots, background)
    image = canvas.with_noise(rng, rng.randint(0, 15))
    return Scene(image, caption, tuple(questions), _general_dialogue(rng, shapes, background), tuple(shapes))


def _draw_shape(canvas: _Canvas, shape: Shape, color: Color) -> None:
    x, y, radius = shape.x, shape.y, shape.radius
    if shape.name == "circle":
        canvas.disc(x, y, radius, color)
    elif shape.name == "square":
        canvas.rectangle(x, y, radius * 0.88, radius * 0.88, color)
    elif shape.name == "triangle":
        canvas.polygon(
            [(x, y - radius), (x - radius, y + radius * 0.9), (x + radius, y + radius * 0.9)], color
        )
    elif shape.name == "ring":
        canvas.ring(x, y, radius, color, width=max(2, round(radius * 0.4)))
    elif shape.name == "cross":
        canvas.rectangle(x, y, radius, radius * 0.3, color)
        canvas.rectangle(x, y, radius * 0.3, radius, color)
    elif shape.name == "bar":
        canvas.rectangle(x, y, radius, radius * 0.35, color)


def _mention(rng: random.Random, shapes: Sequence[Shape]) -> tuple[Shape, str]:
    """A shape and words that mean it alone: "red circle", or "circle" or "red shape" if there is one."""
    shape = rng.choice(shapes)
    words = [f"{shape.color} {shape.name}"]
    if sum(other.name == shape.name for other in shapes) == 1:
        words.append(shape.name)
    if sum(other.color == shape.color for other in shapes) == 1:
        words.append(f"{shape.color} shape")
    return shape, rng.choice(words)


def _general_questions(
    rng: random.Random, shapes: Sequence[Shape], colors: Sequence[str], dots: str, background: str
) -> list[SceneQuestion]:
    shown = {(shape.color, shape.name) for shape in shapes}
    shown_colors = [color for color in colors if any(shape.color == color for shape in shapes)]
    shown_names = [name for name in SHAPES if any(shape.name == name for shape in shapes)]
    count = COUNTS[len(shapes) - 1]

    shape = rng.choice(
        shapes
    )  # the false question differs from the true one in colour or in shape, not in both
    near = (
        [(color, shape.name) for color in colors]
        if rng.random() < 0.5
        else [(shape.color, name) for name in SHAPES]
    )
    absent = rng.choice([candidate for candidate in near if candidate not in shown])
    questions = _pair(
        "object", "Is there {}?", _article(f"{shape.color} {shape.name}"), _article(" ".join(absent))
    )
    absent_color = rng.choice([color for color in colors if color not in shown_colors])
    questions += _pair(
        "color", "Is there {} shape?", _article(rng.choice(shown_colors)), _article(absent_color)
    )
    absent_name = rng.choice([name for name in SHAPES if name not in shown_names])
    questions += _pair("shape", "Is there a {}?", rng.choice(shown_names), absent_name)
    shape, words = _mention(rng, shapes)
    questions += _pair(
        "side", f"Is the {words} on the {{}}?", shape.side, _other(rng, shape.side, ("left", "right"))
    )
    shape, words = _mention(rng, shapes)
    questions += _pair(
        "size", f"Is the {words} {{}}?", shape.size, _other(rng, shape.size, ("large", "small"))
    )
    questions += _pair("count", "{}?", _are_there(count), _are_there(_other(rng, count, COUNTS)))
    questions += _pair(
        "background", "Is the background {}?", background, _other(rng, background, BACKGROUNDS)
    )
    if dots:
        questions += _pair("dots", "Are there {} dots?", dots, _other(rng, dots, ("few", "many")))
    if dots or rng.random() < _DOTTED / (
        1 - _DOTTED
    ):  # as often asked where there are none as where there are some
        questions += _presence("dots", bool(dots), "Are there dots?", "Are dots absent?")

    for shape in shapes:
        if sum(other.name == shape.name for other in shapes) == 1:
            questions.append(_open("color", f"What color is the {shape.name}?", shape.color))
        if sum(other.color == shape.color for other in shapes) == 1:
            questions.append(_open("shape", f"What shape is {shape.color}?", shape.name))
    shape, words = _mention(rng, shapes)
    questions.append(_open("place", f"Where is the {words}?", shape.place))
    shape, words = _mention(rng, shapes)
    questions.append(_open("side", f"Which side is the {words} on?", shape.side))
    shape, words = _mention(rng, shapes)
    questions.append(_open("size", f"How large is the {words}?", shape.size))
    shape = rng.choice(shapes)
    questions.append(_open("object", f"What is in the {shape.place}?", f"{shape.color} {shape.name}"))
    questions.append(_open("count", "How many shapes are there?", count))
    questions.append(_open("background", "What color is the background?", background))
    if dots:
        questions.append(_open("dots", "How many dots are there?", dots))
    return questions


def _are_there(count: str) -> str:
    return "Is there one shape" if count == "one" else f"Are there {count} shapes"


def _general_dialogue(rng: random.Random, shapes: Sequence[Shape], background: str) -> Turns:
    first, first_words = _mention(rng, shapes)
    second, second_words = _mention(rng, shapes)
    turns = [
        (
            f"Please tell me about the {first_words}.",
            f"It is a {first.size} {first.color} {first.name} in the {first.place}.",
        ),
        (f"Please tell me where the {second_words} is.", f"The {second_words} is on the {second.side} side."),
        ("Please tell me about the background.", f"The background is {background}."),
    ]
    return tuple(rng.sample(turns, 2))


# ----------------------------------------------------------------------------------------------------
# the clinic

_LESIONS = 0.8  # share of the CT and MRI scans with a lesion


def _chest_xray(rng: random.Random) -> Scene:
    finding = rng.choice(("", "nodule", "nodule", "effusion", "effusion"))
    side = rng.choice(("left", "right"))
    heart = rng.choice(("large", "normal"))

    canvas = _Canvas(_gray(rng, 120, 150), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    lung = rng.randint(25, 55)
    for x in (23, 57):
        canvas.ellipse(x, 40, rng.randint(11, 13), rng.randint(25, 28), (lung, lung, lung))
        for y in range(18, 64, 9):
            canvas.arc(x, y + 2, 13, 6, 200, 340, (lung + 30, lung + 30, lung + 30))
    bone = _gray(rng, 175, 200)
    canvas.ellipse(40, 40, 4, 32, bone)
    canvas.ellipse(42, 52, rng.randint(13, 15) if heart == "large" else rng.randint(6, 8), 10, bone)
    x = 21 if side == "left" else 59
    if finding == "nodule":
        canvas.disc(x + rng.randint(-3, 2), rng.randint(24, 40), rng.randint(4, 5), _gray(rng, 200, 240))
    elif finding == "effusion":
        top = rng.randint(48, 54)
        canvas.rectangle(x, (top + 70) / 2, 12, (70 - top) / 2, _gray(rng, 195, 225))

    lungs = f"{_article(finding)} in the {side} lung" if finding else "clear lungs"
    caption = f"A chest X-ray showing {lungs} and a {heart} heart."
    questions = _modality_pair(rng, "chest X-ray")
    if not finding:
        questions += _presence(
            "finding",
            True,
            "Are the lungs clear?",
            f"Is there {_article(rng.choice(('nodule', 'effusion')))}?",
        )
    elif rng.random() < 0.5:
        questions += _presence("finding", True, f"Is there {_article(finding)}?", "Are the lungs clear?")
    else:
        other = _other(rng, finding, ("nodule", "effusion"))
        questions += _pair("finding", "Is there {}?", _article(finding), _article(other))
    questions += _pair("heart", "Is the heart {}?", heart, _other(rng, heart, ("large", "normal")))
    if finding:
        questions += _side_pair(finding, side)
    questions += [_open("modality", "Which modality is this?", "chest X-ray")]
    questions += [_open("finding", "What is the main finding?", finding or "clear lungs")]
    questions += [_open("heart", "How large is the heart?", heart)]
    turns = [
        ("Please tell me about the lungs.", f"There is {lungs}." if finding else "The lungs are clear."),
        ("Please tell me about the heart.", f"The heart is {heart}."),
    ]
    if finding:
        questions += [_open("side", f"Which side is the {finding} on?", side)]
        turns.append((f"Please tell me where the {finding} is.", f"The {finding} is on the {side} side."))
    return _clinic_scene(rng, canvas, caption, questions, turns, "chest X-ray")


def _ct_scan(rng: random.Random) -> Scene:
    organs = {"liver": (23, 34), "spleen": (60, 32), "kidney": rng.choice(((27, 57), (53, 57)))}
    organ = rng.choice(tuple(organs))
    lesion = rng.random() < _LESIONS
    look = rng.choice(("bright", "dark"))

    canvas = _Canvas(_gray(rng, 0, 12), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    canvas.ellipse(40, 40, rng.randint(34, 37), rng.randint(26, 30), _gray(rng, 75, 90))
    tissue = _gray(rng, 125, 145)
    canvas.ellipse(23, 34, 15, 14, tissue)
    canvas.ellipse(60, 32, 9, 11, tissue)
    canvas.ellipse(27, 57, 7, 6, tissue)
    canvas.ellipse(53, 57, 7, 6, tissue)
    canvas.disc(40, 60, 5, (235, 235, 235))
    if lesion:
        x, y = organs[organ]
        color = _gray(rng, 215, 245) if look == "bright" else _gray(rng, 10, 40)
        canvas.disc(x + rng.randint(-2, 2), y + rng.randint(-1, 1), rng.randint(4, 5), color)

    shown = f"a {look} lesion in the {organ}" if lesion else "no lesion"
    questions = _modality_pair(rng, "CT scan") + _lesion_pair(rng, lesion)
    turns = [("Please tell me about the scan.", f"The CT scan shows {shown}.")]
    if lesion:
        questions += _pair("organ", "Is the lesion in the {}?", organ, _other(rng, organ, organs))
        questions += _pair("look", "Is the lesion {}?", look, _other(rng, look, ("bright", "dark")))
        questions += [
            _open("organ", "Which organ is the lesion in?", organ),
            _open("look", "How bright is the lesion?", look),
        ]
        turns.append(("Please tell me where the lesion is.", f"The lesion is in the {organ}."))
        turns.append(("Please tell me about the lesion.", f"The lesion is {look}."))
    questions += [_open("modality", "Which modality is this?", "CT scan")]
    return _clinic_scene(
        rng, canvas, f"A CT scan of the abdomen showing {shown}.", questions, turns, "CT scan"
    )


def _brain_mri(rng: random.Random) -> Scene:
    lesion = rng.random() < _LESIONS
    side = rng.choice(("left", "right"))
    size = rng.choice(("large", "small"))

    canvas = _Canvas(_gray(rng, 0, 10), shift=(rng.randint(-3, 3), rng.randint(-3, 3)))
    width, height = rng.randint(26, 29), rng.randint(32, 35)
    canvas.ellipse(40, 40, width, height, _gray(rng, 170, 200))
    canvas.ellipse(40, 40, width - 3, height - 3, _gray(rng, 95, 120))
    fluid = _gray(rng, 25, 40)
    canvas.ellipse(36, 38, 2, rng.randint(8, 10), fluid)
    canvas.ellipse(44, 38, 2, rng.randint(8, 10), fluid)
    canvas.rectangle(40, 40, 0, 30, _gray(rng, 55, 65))
    if lesion:
        away = rng.randint(10, 15)
        radius = rng.randint(7, 8) if size == "large" else 3
        canvas.disc(
            40 - away if side == "left" else 40 + away, rng.randint(23, 57), radius, _gray(rng, 215, 250)
        )

    shown = f"a {size} lesion on the {side} side" if lesion else "no lesion"
    questions = _modality_pair(rng, "MRI scan") + _lesion_pair(rng, lesion)
    turns = [("Please tell me about the scan.", f"The MRI scan shows {shown}.")]
    if lesion:
        questions += _side_pair("lesion", side)
        questions += _pair("size", "Is the lesion {}?", size, _other(rng, size, ("large", "small")))
        questions += [
            _open("side", "Which side is the lesion on?", side),
            _open("size", "How large is the lesion?", size),
        ]
        turns.append(("Please tell me where the lesion is.", f"The lesion is on the {side} side."))
        turns.append(("Please tell me about the lesion.", f"The lesion is {size}."))
    questions += [_open("modality", "Which modality is this?", "MRI scan")]
    return _clinic_scene(
        rng, canvas, f"An MRI scan of the brain showing {shown}.", questions, turns, "MRI scan"
    )


def _histology(rng: random.Random) -> Scene:
    mitoses = rng.choice(("few", "many"))
    glands = rng.random() < 0.5

    canvas = _Canvas(_vary(rng, (238, 185, 205), 10))
    for _ in range(rng.randint(25, 40)):
        canvas.disc(rng.randint(2, 78), rng.randint(2, 78), 2, _vary(rng, (175, 120, 190), 8))
    if glands:
        for x in (rng.randint(15, 32), rng.randint(48, 65)):
            canvas.ring(
                x, rng.randint(15, 65), rng.randint(9, 13), (120, 60, 150), width=3, fill=(250, 240, 245)
            )
    for _ in range(rng.randint(11, 16) if mitoses == "many" else rng.randint(1, 3)):
        canvas.ellipse(rng.randint(4, 76), rng.randint(4, 76), 3, 2, _vary(rng, (55, 15, 85), 10))

    caption = f"A histology slide showing {mitoses} mitoses and {'glands' if glands else 'no glands'}."
    questions = _modality_pair(rng, "histology slide")
    questions += _pair("mitoses", "Are there {} mitoses?", mitoses, _other(rng, mitoses, ("few", "many")))
    questions += _presence("glands", glands, "Are there glands?", "Are glands absent?")
    questions += [_open("modality", "Which modality is this?", "histology slide")]
    questions += [_open("mitoses", "How many mitoses are there?", mitoses)]
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

    canvas = _Canvas(_vary(rng, (60, 110, 160)))
    x, y = rng.randint(34, 46), rng.randint(34, 46)
    radius = rng.randint(22, 27) if size == "large" else rng.randint(10, 14)
    outline = []
    for step in range(14):
        angle = step * math.tau / 14
        across, down = radius * rng.uniform(0.85, 1.1), radius * rng.uniform(0.75, 1.0)
        outline.append((x + across * math.cos(angle), y + down * math.sin(angle)))
    canvas.polygon(outline, _vary(rng, _TISSUE_COLORS[color]))
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
    questions += _pair("size", "Is the specimen {}?", size, _other(rng, size, ("large", "small")))
    questions += _pair("color", "Is the specimen {}?", color, _other(rng, color, _TISSUE_COLORS))
    questions += _presence("necrosis", necrosis, "Is there necrosis?", "Is necrosis absent?")
    questions += [_open("modality", "Which modality is this?", "gross specimen")]
    questions += [_open("size", "How large is the specimen?", size)]
    questions += [_open("color", "What color is the specimen?", color)]
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
    canvas: _Canvas,
    caption: str,
    questions: list[SceneQuestion],
    turns: list[tuple[str, str]],
    modality: str,
) -> Scene:
    """Noise over the drawing, and two turns out of those that fit it."""
    turns = [*turns, ("Please tell me about the modality.", f"This is {_article(modality)}.")]
    return Scene(
        canvas.with_noise(rng, rng.randint(2, 12)), caption, tuple(questions), tuple(rng.sample(turns, 2))
    )


def _modality_pair(rng: random.Random, modality: str) -> list[SceneQuestion]:
    return _pair("modality", "Is this {}?", _article(modality), _article(_other(rng, modality, MODALITIES)))


def _side_pair(thing: str, side: str) -> list[SceneQuestion]:
    return _pair("side", f"Is the {thing} on the {{}}?", side, "right" if side == "left" else "left")


def _lesion_pair(rng: random.Random, lesion: bool) -> list[SceneQuestion]:
    """Asked as often of scans with a lesion as of those without, so that the words do not give the answer
    away."""
    if lesion and rng.random() >= (1 - _LESIONS) / _LESIONS:
        return []
    return _presence("lesion", lesion, "Is there a lesion?", "Is the scan normal?")


# ----------------------------------------------------------------------------------------------------
# data on disk


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
    """A row of a LLaVA JSON file; the image stands in the first turn."""
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

"""General scenes: coloured shapes on a plain background, what the tiny base checkpoint has seen."""

from __future__ import annotations

import random
from collections.abc import Sequence

from scene import (
    Canvas,
    Color,
    Scene,
    SceneQuestion,
    Shape,
    Turns,
    another,
    article,
    open_question,
    presence,
    question_pair,
    vary,
)

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
    canvas = Canvas(vary(rng, COLORS[background]))

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
        _draw_shape(canvas, shapes[-1], vary(rng, COLORS[color], 12))
    shapes.sort(key=lambda shape: (shape.y >= 40, shape.x))

    caption = " and ".join(
        f"a {shape.size} {shape.color} {shape.name} in the {shape.place}" for shape in shapes
    )
    caption += f" with {dots} {dot_color} dots" if dots else ""
    caption = f"A{caption[1:]} on a {background} background."
    questions = _general_questions(rng, shapes, colors, dots, background)
    image = canvas.with_noise(rng, rng.randint(0, 15))
    return Scene(image, caption, tuple(questions), _general_dialogue(rng, shapes, background), tuple(shapes))


def _draw_shape(canvas: Canvas, shape: Shape, color: Color) -> None:
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

    # The false question differs from the true one in colour or in shape, not in both
    shape = rng.choice(shapes)
    near = (
        [(color, shape.name) for color in colors]
        if rng.random() < 0.5
        else [(shape.color, name) for name in SHAPES]
    )
    absent = rng.choice([candidate for candidate in near if candidate not in shown])
    questions = question_pair(
        "object", "Is there {}?", article(f"{shape.color} {shape.name}"), article(" ".join(absent))
    )
    absent_color = rng.choice([color for color in colors if color not in shown_colors])
    questions += question_pair(
        "color", "Is there {} shape?", article(rng.choice(shown_colors)), article(absent_color)
    )
    absent_name = rng.choice([name for name in SHAPES if name not in shown_names])
    questions += question_pair("shape", "Is there a {}?", rng.choice(shown_names), absent_name)
    shape, words = _mention(rng, shapes)
    questions += question_pair(
        "side", f"Is the {words} on the {{}}?", shape.side, another(rng, shape.side, ("left", "right"))
    )
    shape, words = _mention(rng, shapes)
    questions += question_pair(
        "size", f"Is the {words} {{}}?", shape.size, another(rng, shape.size, ("large", "small"))
    )
    questions += question_pair("count", "{}?", _are_there(count), _are_there(another(rng, count, COUNTS)))
    questions += question_pair(
        "background", "Is the background {}?", background, another(rng, background, BACKGROUNDS)
    )
    if dots:
        questions += question_pair("dots", "Are there {} dots?", dots, another(rng, dots, ("few", "many")))
    # As often asked where there are none as where there are some
    if dots or rng.random() < _DOTTED / (1 - _DOTTED):
        questions += presence("dots", bool(dots), "Are there dots?", "Are dots absent?")

    for shape in shapes:
        if sum(other.name == shape.name for other in shapes) == 1:
            questions.append(open_question("color", f"What color is the {shape.name}?", shape.color))
        if sum(other.color == shape.color for other in shapes) == 1:
            questions.append(open_question("shape", f"What shape is {shape.color}?", shape.name))
    shape, words = _mention(rng, shapes)
    questions.append(open_question("place", f"Where is the {words}?", shape.place))
    shape, words = _mention(rng, shapes)
    questions.append(open_question("side", f"Which side is the {words} on?", shape.side))
    shape, words = _mention(rng, shapes)
    questions.append(open_question("size", f"How large is the {words}?", shape.size))
    shape = rng.choice(shapes)
    questions.append(open_question("object", f"What is in the {shape.place}?", f"{shape.color} {shape.name}"))
    questions.append(open_question("count", "How many shapes are there?", count))
    questions.append(open_question("background", "What color is the background?", background))
    if dots:
        questions.append(open_question("dots", "How many dots are there?", dots))
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

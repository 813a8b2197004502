"""A scene as a value: an image, a caption, questions with answers, a dialogue; what all scenes share.

Every closed question is followed by its opposite, about the same image and with the other answer, so that
neither the words of a question nor a liking for "yes" helps: guessing scores one half.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageDraw

IMAGE_SIZE = 80
INSTRUCTIONS = ("Describe the image.", "Please describe the image.", "Give a short description of the image.")
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
    """One shape of a general scene: what it is called, and the centre and radius, in pixels, of it."""

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


class Canvas:
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


def gray(rng: random.Random, low: int, high: int) -> Color:
    level = rng.randint(low, high)
    return (level, level, level)


def vary(rng: random.Random, color: Color, by: int = 14) -> Color:
    red, green, blue = (min(255, max(0, value + rng.randint(-by, by))) for value in color)
    return (red, green, blue)


def article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"an {noun}" if noun[0] in "aeiou" or noun.startswith("MRI") else f"a {noun}"


def question_pair(kind: str, words: str, true: str, false: str) -> list[SceneQuestion]:
    """A closed question and its opposite: `words` with `{}` filled once so that it is true, once so that it
    is false."""
    return [
        SceneQuestion(words.format(true), "yes", "closed", kind),
        SceneQuestion(words.format(false), "no", "closed", kind),
    ]


def presence(kind: str, present: bool, question: str, opposite: str) -> list[SceneQuestion]:
    """Two closed questions after one thing, of which one is true if it is present, the other if it is not."""
    answers = ("yes", "no") if present else ("no", "yes")
    return [
        SceneQuestion(words, answer, "closed", kind)
        for words, answer in zip((question, opposite), answers, strict=True)
    ]


def open_question(kind: str, question: str, answer: str) -> SceneQuestion:
    return SceneQuestion(question, answer, "open", kind)


def another(rng: random.Random, value: str, values: Iterable[str]) -> str:
    """One of `values` that is not `value`."""
    return rng.choice([candidate for candidate in values if candidate != value])

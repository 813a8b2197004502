"""Data as values: a turn, a conversation about images, a question with its answer. No torch, no file access.

`<image>` in a user's text is the place of the next of the conversation's images, as in LLaVA's own data
files. Where the marker is in the first turn does not matter for training (the checkpoint's chat template
decides); which turn it is in does. Reading files, and deciding what of them is fit for use, is
`datasets/`; turning text into tokens is `packing/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .errors import DataError

IMAGE_MARKER = "<image>"
ROLES = ("user", "assistant")
ANSWER_TYPES = ("open", "closed")

Role = Literal["user", "assistant"]
AnswerType = Literal["open", "closed"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Args:
        role: `"user"` or `"assistant"`.
        text: the words; whitespace around them is removed. A user's text may hold `<image>` markers, an
            assistant's may not.
        supervised: of an assistant's: whether it is learnt. One that is not is still shown before later ones.

    Raises:
        DataError: an unknown role, a text that is not a string, an empty answer, a marker inside an answer.
    """

    role: Role
    text: str
    supervised: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"Turn.role is {self.role!r}; wanted one of {', '.join(ROLES)}.")
        if not isinstance(self.text, str):
            raise DataError(f"Turn.text is {self.text!r} ({type(self.text).__name__}); wanted a string.")
        object.__setattr__(self, "text", self.text.strip())
        if not self.text:
            raise DataError(
                f"Turn.text of the {self.role} is empty; wanted words. Leave the conversation out."
            )
        if not isinstance(self.supervised, bool):
            raise DataError(f"Turn.supervised is {self.supervised!r}; wanted True or False.")
        if self.role == "assistant" and IMAGE_MARKER in self.text:
            raise DataError(
                f"Turn.text of the assistant holds {IMAGE_MARKER}; images belong to the user's turns."
            )

    @property
    def image_count(self) -> int:
        """How many images this turn shows."""
        return self.text.count(IMAGE_MARKER)


@dataclass(frozen=True, slots=True)
class Conversation:
    """User and assistant taking turns about zero or more images; the assistant's words are what is learnt.

    Args:
        id: the row's own id, for reports.
        turns: user first, then alternating, the assistant last.
        images: paths of the image files, one for each `<image>` marker, in the order of the markers.
        source: `"file.json:17"`: file and row (counted from 1) it came from, for error messages.
        system: a system message before the turns, without images; `""`: what the checkpoint's template writes
            without one.

    Raises:
        DataError: turns that do not alternate, markers and images that differ in number, or a system message
            that is no text or holds a marker.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    source: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        turns = tuple(self.turns) if isinstance(self.turns, Iterable) else (None,)
        if not all(isinstance(turn, Turn) for turn in turns):
            raise DataError(f"Conversation.turns is {self.turns!r}; wanted a tuple of Turn.")
        object.__setattr__(self, "turns", turns)
        if isinstance(self.images, str):
            raise DataError(f"Conversation.images is the string {self.images!r}; wanted a tuple of paths.")
        object.__setattr__(self, "images", tuple(str(image) for image in self.images))
        if not isinstance(self.system, str) or IMAGE_MARKER in self.system:
            raise DataError(f"Conversation.system is {self.system!r}; wanted words without {IMAGE_MARKER}.")
        object.__setattr__(self, "system", self.system.strip())
        if not self.turns:
            raise DataError("Conversation.turns is empty; wanted a user's turn and the assistant's answer.")
        for position, turn in enumerate(self.turns):
            wanted = ROLES[position % 2]
            if turn.role != wanted:
                raise DataError(
                    f"Conversation.turns: turn {position + 1} is the {turn.role}'s; wanted the {wanted}'s "
                    "(user first, then alternating)."
                )
        if len(self.turns) % 2:
            raise DataError(
                f"Conversation.turns: the last of {len(self.turns)} turns is the user's; wanted an answer to "
                "it."
            )
        markers = sum(turn.image_count for turn in self.turns)
        if markers != len(self.images):
            raise DataError(
                f"Conversation has {markers} {IMAGE_MARKER} marker(s) and {len(self.images)} image(s); "
                "wanted equal numbers."
            )


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image with its true answer (VQA-RAD, SLAKE, PathVQA).

    Args:
        id: the data set's own id.
        image: path of the image file.
        question: the question's words, without an image marker.
        answer: the true answer.
        answer_type: `"closed"` (yes/no or a choice) or `"open"`.
        split: the data set's own split, such as `"train"` or `"test"`.
        source: `"file.json:17"`, for error messages.
        attributes: further columns of the row as (name, value) pairs, such as `("image_organ", "HEAD")`.

    Raises:
        DataError: question or answer has no words or holds an image marker, or `answer_type` is another.
    """

    id: str
    image: str
    question: str
    answer: str
    answer_type: AnswerType
    split: str = ""
    source: str = ""
    attributes: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", str(self.image))
        for name in ("question", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"Question.{name} is {value!r}; wanted words.")
            if IMAGE_MARKER in value:
                raise DataError(
                    f"Question.{name} holds {IMAGE_MARKER}; wanted the words alone, the image is a field."
                )
            object.__setattr__(self, name, value.strip())
        if self.answer_type not in ANSWER_TYPES:
            raise DataError(
                f"Question.answer_type is {self.answer_type!r}; wanted one of {', '.join(ANSWER_TYPES)}."
            )

    def conversation(self) -> Conversation:
        """The question as a one-turn conversation, for training."""
        turns = (Turn("user", f"{IMAGE_MARKER}\n{self.question}"), Turn("assistant", self.answer))
        return Conversation(self.id, turns, (self.image,), self.source)

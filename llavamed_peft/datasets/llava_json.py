"""LLaVA's own JSON: `{"id", "image", "conversations": [{"from": "human"|"gpt", "value": "…<image>…"}]}`
becomes `Conversation`s.

Reads an array or JSON lines, as a stream. What published files are known to do is allowed: the key
`"conversatons"`, values that are numbers, rows without an image, `<image>` before or after the question or in
a later turn, several images (a list under `image` or `images`), ids that are numbers, missing, or occur
twice. What would have to be guessed is rejected with a reason: above all, an image whose row has no `<image>`
for it is not put anywhere, since which turn shows it is what is learnt.

What changes what is learnt is read or refused, never passed over: a system message (the row's `system` or
`system_prompt`, or a first turn `"from": "system"`), an answer that is not to be learnt (`weight` or `loss`
of its turn is 0), videos and audio. Keys that change nothing (`domain`, …) are named once a file, in a
warning.

Left out: decoding the images; that a row's image files exist is checked.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

from ..conversations import IMAGE_MARKER, Conversation, Role, Turn
from .image_folder import ImageFolder
from .json_rows import json_kind, json_rows, row_id, text_of
from .rejects import BadRow, Rejects, refuse

WANTED = "LLaVA JSON: an array of rows, or one row a line, in UTF-8"

_TURN_KEYS = ("conversations", "conversatons")  # the second is a misspelling in released files of LLaVA-Med
_IMAGE_KEYS = ("image", "images")
_SYSTEM_KEYS = ("system", "system_prompt")
_ROW_KEYS = ("id", *_IMAGE_KEYS, *_TURN_KEYS, *_SYSTEM_KEYS)
_LEARNT_KEYS = ("weight", "loss")  # of a turn: 0 or false, and the answer is shown but not learnt
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_MEDIA_MARKER = re.compile(r"<(video|audio)>")
_SPEAKERS: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    rejects: Rejects | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of a LLaVA JSON file in its order, one at a time.

    Args:
        path: the file. Nothing is read before the first conversation is asked for.
        image_folder: where the rows' image paths start; `None` means the folder of the file.
        rejects: takes the rows that cannot be used (`rejects.Reason` names the reasons); with `None` the
            first one raises.

    Returns:
        A generator. A conversation's `id` is the row's, `"row 17"` where it has none; `images` are paths
        ready to open; `source` is `"file.json:17"`, the row counted from 1 (in JSON lines: the line).

    Raises:
        DataError: the file cannot be used, or a row cannot and `rejects` is `None`.

    Warns:
        UserWarning: at the end of the file: rows or turns have keys that are not read; each is named.
    """
    not_read: dict[str, int] = {}  # key → the first row that has it
    folder: ImageFolder | None = None if image_folder is None else ImageFolder(image_folder)
    basename = os.path.basename(os.fspath(path))
    for number, row in json_rows(path, _ROW_KEYS, WANTED, rejects):
        folder = folder or ImageFolder.of_file(path)
        id = row_id(row, "id", number)
        try:
            system, turns = _turns(row)
            images = _images(row, sum(turn.image_count for turn in turns), folder)
        except BadRow as fault:
            refuse(rejects, path, number, id, fault)
        else:
            for key in _keys_not_read(row):
                not_read.setdefault(key, number)
            yield Conversation(id, turns, images, f"{basename}:{number}", system)
    if not_read:
        found = ", ".join(f"{key!r} (first in row {number})" for key, number in not_read.items())
        warnings.warn(f"{path}: keys that are not read: {found}.", stacklevel=2)


def _keys_not_read(row: dict[str, Any]) -> Iterator[str]:
    for key, value in row.items():
        if key in _TURN_KEYS:
            for turn in value:
                yield from (f"{key}.{name}" for name in turn if name not in ("from", "value", *_LEARNT_KEYS))
        elif key not in (*_ROW_KEYS, *_OTHER_MEDIA):
            yield key


def _turns(row: Any) -> tuple[str, tuple[Turn, ...]]:
    """The row's system message, empty where it has none, and its turns."""
    if not isinstance(row, dict):
        raise BadRow("malformed row", f"the row is {json_kind(row)}; wanted an object with 'conversations'.")
    if media := next((key for key in _OTHER_MEDIA if row.get(key) not in (None, "", [])), None):
        raise BadRow("video or audio", f"the row has {media!r}; wanted images only.")
    key = next((key for key in _TURN_KEYS if key in row), None)
    if key is None and "messages" in row:
        raise BadRow(
            "malformed row",
            "the row has 'messages', a form that is not read; wanted 'conversations', a list of "
            '{"from": "human" or "gpt", "value": …}, and images under \'image\'.',
        )
    if key is None:
        a_question = {"question", "answer"} <= row.keys()
        hint = (
            " VQA-RAD's own files, and no other set's, are read by recipes/vqa.py --dataset vqa_rad."
            if a_question
            else ""
        )
        raise BadRow("malformed row", f"the row has no 'conversations'; wanted a list of turns.{hint}")
    said = row[key]
    if not isinstance(said, list) or not said:
        came = "an empty list" if said == [] else json_kind(said)
        raise BadRow("malformed row", f"{key!r} is {came}; wanted a list of turns.")
    messages = [(name, row[name]) for name in _SYSTEM_KEYS if row.get(name) not in (None, "")]
    if isinstance(said[0], dict) and said[0].get("from") == "system":
        messages.append(("turn 1", said[0].get("value")))
        said = said[1:]
    if len(messages) > 1:
        names = " and ".join(name for name, _ in messages)
        raise BadRow("malformed row", f"the row has several system messages ({names}); wanted one of them.")
    system = _system_message(*messages[0]) if messages else ""
    turns = tuple(_turn(turn, position) for position, turn in enumerate(said, 1))
    if not turns or len(turns) % 2:
        raise BadRow(
            "last turn is a question", f"turn {len(turns)}, the last, is the human's; wanted an answer to it."
        )
    return system, turns


def _system_message(name: str, value: Any) -> str:
    text = text_of(value, f"the system message ({name})").strip()
    if IMAGE_MARKER in text or _MEDIA_MARKER.search(text):
        raise BadRow("malformed row", f"the system message ({name}) shows an image; wanted words.")
    return text


def _turn(turn: Any, position: int) -> Turn:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        came = (
            f"has the keys {', '.join(map(repr, turn)) or 'none'}"
            if isinstance(turn, dict)
            else f"is {json_kind(turn)}"
        )
        raise BadRow("malformed row", f"turn {position} {came}; wanted an object with 'from' and 'value'.")
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(
            "unknown speaker", f"turn {position} is from {speaker!r}; wanted one of {', '.join(_SPEAKERS)}."
        )
    if role != ("user" if position % 2 else "assistant"):
        wanted = "human" if position % 2 else "gpt"
        raise BadRow(
            "turns do not alternate",
            f"turn {position} is from {speaker!r}; wanted {wanted!r} (human first, then in turn).",
        )
    text = text_of(turn["value"], f"the value of turn {position}")
    if marker := _MEDIA_MARKER.search(text):
        raise BadRow("video or audio", f"turn {position} holds {marker[0]}; wanted images only.")
    if not text.strip():
        if role == "user":
            raise BadRow(
                "empty question",
                f"turn {position} is an empty question; wanted words, or {IMAGE_MARKER} at least.",
            )
        raise BadRow("empty answer", f"turn {position} is an empty answer; wanted words.")
    if role == "assistant" and IMAGE_MARKER in text:
        raise BadRow(
            "marker in an answer",
            f"turn {position} is an answer with {IMAGE_MARKER}; wanted images in questions only.",
        )
    return Turn(role, text, _is_learnt(turn, role, position))


def _is_learnt(turn: dict[str, Any], role: Role, position: int) -> bool:
    """Whether an answer counts in the loss; it does unless its turn says otherwise."""
    given = {key: turn[key] for key in _LEARNT_KEYS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(
                "malformed row",
                f"turn {position} has {key!r}: {value!r}; wanted 1 (the answer is learnt) or 0 (it is not).",
            )
        if role == "user" and value:
            raise BadRow(
                "malformed row",
                f"turn {position} is a question with {key!r}: {value!r}; only answers are learnt.",
            )
    if len(set(map(bool, given.values()))) > 1:
        raise BadRow("malformed row", f"turn {position} has {given}; wanted one of them, or the same.")
    return all(given.values())


def _images(row: dict[str, Any], markers: int, folder: ImageFolder) -> tuple[str, ...]:
    """The row's images as paths, one for each marker; null, an empty string and an empty list mean that there
    are none."""
    given = [row[key] for key in _IMAGE_KEYS if row.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise BadRow("malformed row", "the row has both 'image' and 'images'; wanted one of them.")
    names = given[0] if given else []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadRow("malformed row", f"the row's image is {names!r}; wanted a path or a list of paths.")
    if len(names) != markers:
        detail = (
            f"the turns hold {markers} {IMAGE_MARKER} marker(s) and the row has {len(names)} image(s); "
            "wanted equal numbers."
        )
        raise BadRow("image count differs from marker count", detail)
    return tuple(folder.path(name) for name in names)

"""VQA-RAD (Lau et al., Scientific Data 2018): questions of clinicians about 315 radiographs, read from its
own JSON.

Two published forms are read, told apart by their rows:

- the original release, `vqa_rad_public.json`: both splits in one file; a row is a test row where its
`phrase_type` starts with
  `test_`. 1,797 training and 451 test questions.
- the form that MEVF and, after it, the LLaVA-Med paper use: `trainset.json` and `testset.json`, a file a
split, 3,064 and 451
  questions. Nothing in a row tells its split, so the file's name must, or the argument `split`.

The splits share images: of the 203 test images, all are training images too in the MEVF form, 202 in the
original one. Finding such leakage is not done here, nor are images decoded; answers stay as printed (`Yes`,
`yes`), since normalising them is the metric's matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..conversations import ANSWER_TYPES, IMAGE_MARKER, AnswerType, Question
from ..errors import ConfigError, DataError
from .image_folder import ImageFolder
from .json_rows import json_kind, json_rows, row_id, text_of
from .rejects import BadRow, Rejects, refuse

Split = Literal["train", "test"]

WANTED = "VQA-RAD's JSON: an array of rows with 'image_name', 'question', 'answer' and 'answer_type'"

_ROW_KEYS = ("qid", "image_name", "question", "answer", "answer_type")
_ATTRIBUTES = ("image_organ", "question_type", "phrase_type")
# Columns of the original release that MEVF's files dropped.
_ORIGINAL_KEYS = (
    "qid_linked_id",
    "image_case_url",
    "evaluation",
    "question_rephrase",
    "question_relation",
    "question_frame",
)
_TEST_PREFIX = "test_"
# trainset, vqa_rad_test, test-v2; not latest
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train|test)(?:ing|set)?(?![a-z])")


def read(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    split: Split | None = None,
    rejects: Rejects | None = None,
) -> Iterator[Question]:
    """Yield the questions of a VQA-RAD file in its order.

    Args:
        path: `vqa_rad_public.json`, or `trainset.json` or `testset.json` of the MEVF form.
        image_folder: where `image_name`s are; `None` means `images/` next to the file if there is one, else
            the file's folder.
        split: `"train"` or `"test"`: only this split; `None`: every row. Rows of the other split are not
            checked. For a file of the MEVF form whose name does not tell its split, `split` says which one
            all of the file is.
        rejects: takes the rows that cannot be used (`rejects.Reason` names the reasons); with `None` the
            first one raises.

    Returns:
        A generator of questions with `split` filled in, `answer_type` lower-cased and without stray
        whitespace, an answer that is a number as text, and the columns `image_organ`, `question_type`,
        `phrase_type` as attributes. The file's rows, some thousand, are held in memory.

    Raises:
        ConfigError: `split` is neither, or is not the split that the file's name says.
        DataError: the file cannot be used, it does not tell its split, or a row cannot be used and `rejects`
            is `None`.
    """
    if split is not None and split not in get_args(Split):
        raise ConfigError(f"split is {split!r}; wanted 'train', 'test' or None.")
    path = Path(path)
    rows = list(json_rows(path, _ROW_KEYS, WANTED, rejects))
    file_split = None if _is_original(row for _, row in rows) else _split_of_file(path, split)
    images = path.parent / "images"
    folder = ImageFolder(image_folder or (images if images.is_dir() else path.parent))
    for number, row in rows:
        try:
            if not isinstance(row, dict):
                raise BadRow("malformed row", f"the row is {json_kind(row)}; wanted an object.")
            row_split = file_split or _split_of_row(row)
            if split is None or split == row_split:
                yield _question(row, number, row_split, folder, f"{path.name}:{number}")
        except BadRow as fault:
            refuse(rejects, path, number, row_id(row, "qid", number), fault)


def _is_original(rows: Iterator[Any]) -> bool:
    return any(
        isinstance(row, dict) and (any(key in row for key in _ORIGINAL_KEYS) or _split_of_row(row) == "test")
        for row in rows
    )


def _split_of_row(row: dict[str, Any]) -> Split:
    """The split of a row of the original release."""
    return "test" if str(row.get("phrase_type")).startswith(_TEST_PREFIX) else "train"


def _split_of_file(path: Path, split: Split | None) -> Split:
    """The split that a file of the MEVF form is, by its name, else by the caller's word."""
    named = set(_SPLIT_IN_NAME.findall(path.stem.lower()))
    if len(named) == 1:
        told = cast(Split, named.pop())
        if split not in (None, told):
            raise ConfigError(
                f"{path}: split={split!r} was asked for, but by its name the file is the {told} split; "
                f"wanted {told!r} or None."
            )
        return told
    if split is None:
        raise DataError(
            f"{path}: neither its rows nor its name tell train from test; "
            "wanted split='train' or 'test', or a name such as trainset.json."
        )
    return split


def _question(row: dict[str, Any], number: int, split: Split, folder: ImageFolder, source: str) -> Question:
    for key in _ROW_KEYS[1:]:
        if key not in row:
            raise BadRow("malformed row", f"the row has no {key!r}; wanted {', '.join(_ROW_KEYS[1:])}.")
    question, answer = (text_of(row["question"], "'question'"), text_of(row["answer"], "'answer'"))
    if not question.strip():
        raise BadRow("empty question", "'question' is empty; wanted words.")
    if IMAGE_MARKER in question:
        raise BadRow("marker in a question", f"'question' holds {IMAGE_MARKER}; wanted the words alone.")
    if not answer.strip():
        raise BadRow("empty answer", "'answer' is empty; wanted words.")
    answer_type = text_of(row["answer_type"], "'answer_type'").strip().lower()
    if answer_type not in ANSWER_TYPES:
        raise BadRow(
            "unknown answer type",
            f"'answer_type' is {row['answer_type']!r}; wanted one of {', '.join(ANSWER_TYPES)}.",
        )
    image = row["image_name"]
    if not isinstance(image, str) or not image.strip():
        raise BadRow("malformed row", f"'image_name' is {image!r}; wanted a file name.")
    return Question(
        id=row_id(row, "qid", number),
        image=folder.path(image),
        question=question,
        answer=answer,
        answer_type=cast(AnswerType, answer_type),
        split=split,
        source=source,
        attributes=tuple(
            (key, text_of(row[key], repr(key))) for key in _ATTRIBUTES if row.get(key) is not None
        ),
    )

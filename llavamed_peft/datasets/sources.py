"""What may be given as a stage's data, and where it comes from: files, or values in memory.

A source knows its name and content hash and reads its conversations one by one; `batches/checking.py`
decides which of them fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..conversations import Conversation, Question
from ..errors import ConfigError, DataError
from ..storage.hashing import file_sha256
from . import llava_json
from .image_folder import ImageFolder


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or some values in memory.

    Args:
        name: of the file, without its folder.
        path: of the file, for `rejected.jsonl`.
        sha256: of its content.
        read: takes the log of rejected rows, yields conversations.
        settings: what its conversations depend on apart from the content (the reader, the image folder, …),
            as text that is equal where they are; `None`: not told, so that its rows are checked anew in every
            call.
    """

    name: str
    path: str
    sha256: str
    read: Callable[[Any], Iterator[Conversation]]
    settings: str | None = None


Data = str | Path | Source | Sequence[str | Path | Source] | Iterable[Conversation | Question]


def question_source(
    read: Callable[..., Iterator[Question]], path: str | Path, image_folder: str | Path | None, split: str
) -> Source:
    """One split of a file of questions, as data for a stage; its rows are counted like those of a LLaVA JSON
    file.

    Args:
        read: the reader of the file's format, such as `vqa_rad.read`.
        path: the file.
        image_folder: as the reader takes it.
        split: as the reader takes it.

    Raises:
        DataError: the file is not there.
    """
    path = Path(path).expanduser()
    image_folder = None if image_folder is None else os.path.expanduser(image_folder)
    if not path.is_file():
        raise DataError(f"{path}: {_instead(path)}; wanted a file of questions.")

    def conversations(rejects: Any) -> Iterator[Conversation]:
        return (question.conversation() for question in read(path, image_folder, split, rejects))

    return Source(
        f"{path.name} ({split})",
        str(path),
        file_sha256(path),
        conversations,
        _settings(read, path, image_folder, split),
    )


def open_sources(data: Data, image_folder: str | Path | None, where: str) -> list[Source]:
    """The sources of one stage's data.

    Args:
        data: a LLaVA JSON file or a `Source`, several, or any iterable of `Conversation` and `Question`.
        image_folder: that the files' image paths are relative to; `None` means each file's own folder.
        where: which entry of `data` this is, for errors.

    Raises:
        ConfigError: another kind of value.
        DataError: a file or the image folder is not there.
    """
    if isinstance(data, (str, Path, Source)):
        data = [data]
    if not isinstance(data, Iterable):
        raise ConfigError(
            f"{where} is {data!r}; wanted a file, a list of files, or Conversation and Question values."
        )
    items = list(data)
    if not items:
        raise ConfigError(
            f"{where} is empty; wanted a file, a list of files, or Conversation and Question values."
        )
    files = [item for item in items if isinstance(item, (str, Path, Source))]
    if len(files) == len(items):
        return [item if isinstance(item, Source) else _file(Path(item), image_folder) for item in files]
    values = [item for item in items if isinstance(item, (Conversation, Question))]
    if len(values) < len(items):
        other = next(item for item in items if not isinstance(item, (Conversation, Question)))
        raise ConfigError(
            f"{where} holds a {type(other).__name__}; wanted only Conversation and Question values, or only "
            "files."
        )
    return [_in_memory(values)]


def _file(path: Path, image_folder: str | Path | None) -> Source:
    path = path.expanduser()
    image_folder = None if image_folder is None else os.path.expanduser(image_folder)
    if not path.is_file():
        raise DataError(f"{path}: {_instead(path)}; wanted a LLaVA JSON file.")
    if image_folder is not None:
        # Known to be missing before the first row is read, perhaps after another stage's 500,000
        ImageFolder(image_folder)

    def conversations(rejects: Any) -> Iterator[Conversation]:
        return llava_json.read(path, image_folder, rejects)

    return Source(
        path.name, str(path), file_sha256(path), conversations, _settings(llava_json.read, path, image_folder)
    )


def _settings(read: Callable[..., Any], path: Path, image_folder: str | Path | None, *others: str) -> str:
    """How a file is read. Folders are named as they were given, since rows hold such paths, and with where
    they are."""
    folder = path.parent if image_folder is None else Path(image_folder)
    return repr((read.__module__, read.__qualname__, os.fspath(folder), os.path.abspath(folder), *others))


def _instead(path: Path) -> str:
    return "is a folder" if path.is_dir() else "no such file"


def _in_memory(values: Sequence[Conversation | Question]) -> Source:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())

    def read(rejects: Any) -> Iterator[Conversation]:
        for row, value in enumerate(values, start=1):
            conversation = value.conversation() if isinstance(value, Question) else value
            yield replace(conversation, source=f"in memory:{row}")

    return Source("in memory", "in memory", digest.hexdigest(), read, settings="")

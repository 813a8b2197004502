"""Which image files are equal, whatever their names."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from .hashing import file_sha256
from .images import errors_of

_END = 4096  # bytes at either end of a file by which most can be told apart


def content_key(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes as 64 hexadecimal digits: equal keys mean equal files, under whatever
    names.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with errors_of(path):
        return file_sha256(Path(path))


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of the file; files of different sizes are different.

    Raises:
        DataError: the file is missing or cannot be looked at.
    """
    with errors_of(path):
        return os.stat(path).st_size


class ContentNames:
    """Names image files by their content, in one pass over them: equal files have one name, different ones
    two.

    What differs in size or at one of its ends is named after these; only files that are alike in them are
    read in full.
    """

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # of size and ends → the first file that has them
        self._names: dict[str, str] = {}  # of content keys, where several files have the same size and ends
        self._read: set[str] = set()  # sizes and ends whose first file was read in full

    def __call__(self, path: str) -> str:
        """The name of a file's content.

        Raises:
            DataError: the file is missing or cannot be read.
        """
        looks = _size_and_ends(path)
        first = self._first.setdefault(looks, path)
        if first == path:
            return looks
        if looks not in self._read:
            with suppress(DataError):  # it is gone by now, and nobody can say whether this one is equal
                self._names.setdefault(content_key(first), looks)
            self._read.add(looks)
        return self._names.setdefault(content := content_key(path), content)


def _size_and_ends(path: str) -> str:
    """A hash, equal for equal files."""
    with errors_of(path), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for begin in (0, max(0, size - _END)):
            file.seek(begin)
            digest.update(file.read(_END))
        return digest.hexdigest()

"""Which image files are the same: by their content, whatever their names, or by where their paths lead."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from .hashing import file_sha256
from .images import errors_of, split_frame

_END = 4096  # bytes at either end of a file by which most can be told apart
_FOLDERS_KNOWN = 10_000  # whose links need not be followed again


def content_key(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits: equal for equal files, whatever their names.

    Where the path names a frame, its number follows.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    file, frame = split_frame(path)
    with errors_of(path, file):
        return file_sha256(Path(file)) + (f"#{frame}" if frame else "")


def contents_among(paths: Collection[str], on_file: Callable[[str], None]) -> dict[str, str]:
    """Path → something that is equal for equal files among these.

    Only files of the same size are read for it; others cannot be equal.

    Args:
        on_file: called with each path before the file is looked at.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    sizes: dict[str, int] = {}
    for path in paths:
        on_file(path)
        file, _ = split_frame(path)
        with errors_of(path, file):
            sizes[path] = os.stat(file).st_size
    files = Counter(sizes.values())
    return {path: content_key(path) if files[size] > 1 else f"path {path}" for path, size in sizes.items()}


def real_path(path: str) -> str:
    """`os.path.realpath`, but folders are remembered: it asks the file system about each on the way."""
    folder, name = os.path.split(os.path.abspath(path))  # what is remembered may not depend on where one is
    real = os.path.join(_real_folder(folder), name)
    return os.path.realpath(real) if os.path.islink(real) else real


@functools.lru_cache(_FOLDERS_KNOWN)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


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
    """A hash, equal for equal files (and the same frame of them)."""
    name, frame = split_frame(path)
    with errors_of(path, name), open(name, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for begin in (0, max(0, size - _END)):
            file.seek(begin)
            digest.update(file.read(_END))
        return digest.hexdigest() + (f"#{frame}" if frame else "")

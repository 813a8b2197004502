"""The rows of a JSON file, one at a time: an array of rows, or JSON lines, told apart by the first character.

An array is parsed as a stream (ijson), so a file of 500,000 rows needs the memory of one. What a row must
look like is its reader's matter; here are the faults of the file: missing, empty, not UTF-8, broken JSON
(placed to the byte), an object in the place of rows. `row_id` and `text_of` read the two kinds of cell every
format has.

Left out: compressed files, and NaN or Infinity, which Python writes but JSON does not have: in an array they
are broken JSON, in JSON lines their line is rejected, and both messages name them. Nor is there a guard
against an array made to be harmful: ijson's memory grows with the square of the nesting depth (5,000 levels:
some 60 MB).
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice, takewhile
from typing import Any, BinaryIO, NoReturn

import ijson

from ..errors import DataError
from .rejects import BadRow, Rejects, refuse

_CAPTION_KEYS = {"pair_id", "fig_caption"}
_LONGEST_LINE = 1 << 26  # bytes; a longer line is no row


def json_rows(
    path: str | os.PathLike[str], row_keys: Collection[str], wanted: str, rejects: Rejects | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (row, value) for each row of a JSON array or of a JSON-lines file; a byte order mark and empty
    lines are skipped.

    Args:
        path: the file.
        row_keys: keys a row may have; a single object with none of them is not JSON lines of one row.
        wanted: what the reader reads, for the messages, such as `"LLaVA JSON: an array of rows, or one row a
            line"`.
        rejects: takes the lines that are not JSON (only JSON lines have such); with `None` they raise.

    Returns:
        A generator. `row` counts from 1; in JSON lines it is the line's number. `value` is any JSON value.

    Raises:
        DataError: the file is missing, a folder, empty, not UTF-8, not JSON, or one JSON object instead of
            rows.
    """
    with _open(path, wanted) as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        while (first := file.read(1)).isspace():
            pass
        if not first:
            raise DataError(f"{path}: the file is empty; wanted {wanted}.")
        file.seek(start)
        if first == b"[":
            yield from _array_rows(file, path, wanted)
        else:
            _require_lines(file, path, first, row_keys, wanted)
            file.seek(start)
            yield from _line_rows(file, path, wanted, rejects)


def row_id(row: Any, key: str, number: int) -> str:
    """The row's own id as a string; `"row 17"` if it is missing, null or empty, or the row is no object."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value).strip() or f"row {number}"
    return f"row {number}"


def text_of(value: Any, what: str) -> str:
    """A cell that holds text. Numbers, true and false become the text that JSON writes for them: 3 -> "3",
    true -> "true".

    Raises:
        BadRow: null, a list or an object, or half a surrogate pair, which no tokenizer takes.
    """
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadRow("malformed row", f"{what} is {json_kind(value)}; wanted text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            "malformed row",
            f"{what} holds half a surrogate pair at character {error.start + 1}; wanted text.",
        ) from error
    return value


def json_kind(value: Any) -> str:
    """What a JSON value is, in words: "null", "a list", "an object", "a number", "a string", "true"."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for kind, words in ((list, "a list"), (dict, "an object"), (str, "a string")):
        if isinstance(value, kind):
            return words
    return "a number"


def _open(path: str | os.PathLike[str], wanted: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; wanted {wanted}.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: a folder; wanted {wanted}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({error}); wanted {wanted}.") from error


class _Pieces:
    """A file handed to the parser in pieces, single bytes from `fine_from` on; counts bytes and lines for the
    error's place."""

    def __init__(self, file: BinaryIO, fine_from: int | None = None) -> None:
        self.file, self.fine_from = file, fine_from
        self.before = self.after = file.tell()  # offsets around the last piece
        self.line = 1  # of the last piece's first byte
        self._breaks = 0

    def read(self, size: int) -> bytes:
        if self.fine_from is not None:
            size = min(size, max(1, self.fine_from - self.after))
        piece = self.file.read(size)
        if piece:
            self.before, self.after = self.after, self.after + len(piece)
            self.line += self._breaks
            self._breaks = piece.count(b"\n")
        return piece


def _array_rows(file: BinaryIO, path: str | os.PathLike[str], wanted: str) -> Iterator[tuple[int, Any]]:
    start = file.tell()
    pieces = _Pieces(file)
    try:
        yield from enumerate(ijson.items(pieces, "item", use_float=True), 1)
    except (ijson.JSONError, UnicodeDecodeError):
        # The parser does not tell where; a second pass, byte by byte in the last piece, does.
        file.seek(start)
        _raise_broken(_Pieces(file, fine_from=pieces.before), path, wanted)


def _raise_broken(pieces: _Pieces, path: str | os.PathLike[str], wanted: str) -> NoReturn:
    row = 0
    try:
        for _ in ijson.items(pieces, "item", use_float=True):
            row += 1
    except (ijson.JSONError, UnicodeDecodeError) as error:
        place = f"byte {pieces.after} (line {pieces.line}, after row {row})"
        fault = str(error).splitlines()[0].strip()
        if isinstance(error, UnicodeDecodeError) or "UTF8" in fault:
            raise DataError(f"{path}: not UTF-8 at {place}; wanted {wanted}.") from error
        if "EOF" in fault:
            raise DataError(
                f"{path}: broken JSON: the file ends too early, at {place}; wanted {wanted}."
            ) from error
        pieces.file.seek(pieces.before)
        if pieces.file.read(8).startswith((b"NaN", b"Infinity")):
            fault = "NaN and Infinity are not JSON, write null"
        raise DataError(f"{path}: broken JSON at {place}: {fault}; wanted {wanted}.") from error
    raise DataError(f"{path}: changed while it was read; wanted {wanted}.")


def _line_rows(
    file: BinaryIO, path: str | os.PathLike[str], wanted: str, rejects: Rejects | None
) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except UnicodeDecodeError as error:
            byte = file.tell() - len(line) + error.start + 1
            raise DataError(f"{path}: not UTF-8 at byte {byte} (line {number}); wanted {wanted}.") from error
        except (ValueError, RecursionError) as error:
            fault = BadRow("line is not JSON", f"the line is not JSON ({error}); wanted one complete object.")
            refuse(rejects, path, number, f"row {number}", fault)
        else:
            yield number, value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON, write null")


def _require_lines(
    file: BinaryIO, path: str | os.PathLike[str], first: bytes, row_keys: Collection[str], wanted: str
) -> None:
    """Raise where a file that does not begin with `[` is not JSON lines either; faults of single lines are
    let through."""
    start = file.tell()
    if first != b"{":
        head = file.read(16)
        file.seek(start)
        if not any(line.lstrip().startswith(b"{") for line in file):
            raise DataError(f"{path}: not JSON, it begins with {head!r}; wanted {wanted}.")
        return
    domain = _caption_domain(file)
    if domain is not None:
        raise DataError(
            f"{path}: one JSON object, {{{domain!r}: [...]}}: it looks like figure captions by domain; "
            f"wanted {wanted}."
        )
    file.seek(start)
    lines = (line for line in iter(partial(file.readline, _LONGEST_LINE), b"") if line.strip())
    head, second = next(lines), next(lines, b"").lstrip()[:1]
    try:
        keys = json.loads(head.decode("utf-8")).keys()
        is_lines = bool(second) or any(key in row_keys for key in keys)
    except (ValueError, RecursionError):
        # Either the first of many rows is damaged, or one object is spread over several lines.
        is_lines = second in (b"", b"{")
    if not is_lines:
        raise DataError(f"{path}: one JSON object; wanted {wanted}.")


def _caption_domain(file: BinaryIO) -> str | None:
    """The first key of a file that begins like LLaVA-Med's figure captions, `{domain: [{"pair_id": …`, else
    `None`."""
    try:
        events = list(
            takewhile(
                lambda item: item[0] != "end_map", islice(ijson.basic_parse(file, multiple_values=True), 40)
            )
        )
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    kinds = [kind for kind, _ in events[:4]]
    inner_keys = {value for kind, value in events[4:] if kind == "map_key"}
    if kinds == ["start_map", "map_key", "start_array", "start_map"] and inner_keys & _CAPTION_KEYS:
        return str(events[1][1])
    return None

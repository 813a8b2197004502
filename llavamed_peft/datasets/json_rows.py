"""The rows of a JSON file, one at a time: an array of rows, JSON lines, or objects one after another that are
spread over several lines each.

What is parsed as a stream (ijson) needs the memory of one row, whatever the file's size. What a row must look
like is its reader's matter; here are the faults of the file: missing, empty, not UTF-8, broken JSON
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
import sys
from collections.abc import Collection, Iterator
from decimal import Decimal
from functools import partial
from itertools import islice, takewhile
from typing import Any, BinaryIO, NoReturn

import ijson

from ..errors import DataError
from .rejects import BadRow, Rejects, refuse

_CAPTION_KEYS = {"pair_id", "fig_caption"}
_MOST_BITS = 14_000  # about 4,200 digits; Python writes 4,300
_END = object()
_LONGEST_LINE = 1 << 26  # bytes; a longer line is no row


def json_rows(
    path: str | os.PathLike[str], row_keys: Collection[str], wanted: str, rejects: Rejects | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield (row, value) for each row of a JSON array, of JSON lines, or of objects one after another; a byte
    order mark and empty lines are skipped.

    Args:
        path: the file.
        row_keys: keys a row may have; a single object with none of them is not JSON lines of one row.
        wanted: what the reader reads, for the messages, such as `"LLaVA JSON: an array of rows, or one row a
            line"`.
        rejects: takes the lines that are not JSON (only JSON lines have such); with `None` they raise.

    Returns:
        A generator. `row` counts from 1; in JSON lines it is the line's number. `value` is any JSON value,
            its whole numbers of any size.

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
            yield from _streamed_rows(file, path, wanted, "item", rejects)
        else:
            spread = _is_spread(file, path, first, row_keys, wanted)
            file.seek(start)
            if spread:
                yield from _streamed_rows(file, path, wanted, "", rejects)
            else:
                yield from _line_rows(file, path, wanted, rejects)


def row_id(row: Any, key: str, number: int) -> str:
    """The row's own id as a string; `"row 17"` if it is missing, null or empty, or the row is no object."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"row {number}"
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


def _streamed_rows(
    file: BinaryIO, path: str | os.PathLike[str], wanted: str, place: str, rejects: Rejects | None
) -> Iterator[tuple[int, Any]]:
    """Rows that the parser finds at a place of the file: `"item"` of an array, `""` one after another."""
    start, last = file.tell(), 0  # last: number of the last row that was read
    # A whole number of more than 64 bits (DICOM's UIDs are) stops the fast pass; the slow one reads on there.
    for any_size in (False, True):
        file.seek(start)
        pieces = _Pieces(file)
        items = enumerate(_items(pieces, place, any_size), 1)
        while True:
            try:
                number, value = next(items, (0, None))
            except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
                if not any_size and "overflow" in str(error):
                    break
                # The parser does not tell where; a second pass, byte by byte in the last piece, does.
                file.seek(start)
                _raise_broken(_Pieces(file, fine_from=pieces.before), path, wanted, place, any_size)
            if number == 0:
                return
            if number <= last:
                continue
            last = number
            if any_size:
                try:
                    value = _plain(value)
                except BadRow as fault:
                    refuse(rejects, path, number, row_id(value, "id", number), fault)
                    continue
            yield number, value


def _items(pieces: _Pieces, place: str, any_size: bool = False) -> Iterator[Any]:
    """ijson's values; with numbers of any size, those with a decimal point are `Decimal`."""
    items = ijson.items(pieces, place, use_float=not any_size, multiple_values=not place)
    if not any_size:
        yield from items
        return
    limit = sys.get_int_max_str_digits()
    while True:
        sys.set_int_max_str_digits(0)  # ijson 3.6 crashes where Python refuses a number's digits
        try:
            value = next(items, _END)
        finally:
            sys.set_int_max_str_digits(limit)
        if value is _END:
            return
        yield value


def _plain(value: Any) -> Any:
    """The value with each `Decimal` as a float.

    Raises:
        BadRow: a whole number that Python would not write out.
    """
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise BadRow("malformed row", f"a whole number has {value.bit_length():,} bits; wanted text.")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _raise_broken(
    pieces: _Pieces, path: str | os.PathLike[str], wanted: str, place: str, any_size: bool = False
) -> NoReturn:
    row = 0
    try:
        for _ in _items(pieces, place, any_size):
            row += 1
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        where = f"byte {pieces.after} (line {pieces.line}, after row {row})"
        fault = str(error).splitlines()[0].strip()
        if isinstance(error, UnicodeDecodeError) or "UTF8" in fault:
            raise DataError(f"{path}: not UTF-8 at {where}; wanted {wanted}.") from error
        if "EOF" in fault:
            raise DataError(
                f"{path}: broken JSON: the file ends too early, at {where}; wanted {wanted}."
            ) from error
        pieces.file.seek(pieces.before)
        if pieces.file.read(8).startswith((b"NaN", b"Infinity")):
            fault = "NaN and Infinity are not JSON, write null"
        raise DataError(f"{path}: broken JSON at {where}: {fault}; wanted {wanted}.") from error
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


def _is_spread(
    file: BinaryIO, path: str | os.PathLike[str], first: bytes, row_keys: Collection[str], wanted: str
) -> bool:
    """Whether a file that does not begin with `[` holds objects over several lines each; otherwise it is JSON
    lines, whose single lines may be broken.

    Raises:
        DataError: it is neither.
    """
    start = file.tell()
    if first != b"{":
        head = file.read(16)
        file.seek(start)
        if not any(line.lstrip().startswith(b"{") for line in file):
            raise DataError(f"{path}: not JSON, it begins with {head!r}; wanted {wanted}.")
        return False
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
        is_one_object = not second and not any(key in row_keys for key in keys)
    except (ValueError, RecursionError):
        if second in (b"", b"{"):  # the first of many rows is damaged
            return False
        file.seek(start)
        keys, follows = _first_object(file)
        is_one_object = not follows and not any(key in row_keys for key in keys)
        if not is_one_object:
            return True
    if is_one_object:
        raise DataError(f"{path}: one JSON object; wanted {wanted}.")
    return False


def _first_object(file: BinaryIO) -> tuple[list[str], bool]:
    """The keys of the file's first object, and whether something follows it; none of its values is kept. Of
    broken JSON as far as it goes."""
    keys: list[str] = []
    depth = 0
    try:
        for event, value in ijson.basic_parse(file, multiple_values=True, use_float=True):
            if depth == 0 and keys and event == "start_map":
                return keys, True
            depth += event in ("start_map", "start_array")
            depth -= event in ("end_map", "end_array")
            if event == "map_key" and depth == 1:
                keys.append(value)
    except (ijson.JSONError, UnicodeDecodeError, ValueError):
        return keys, True  # reading it will say where it breaks
    return keys, False


def _caption_domain(file: BinaryIO) -> str | None:
    """The first key of a file that begins like LLaVA-Med's figure captions, `{domain: [{"pair_id": …`, else
    `None`."""
    try:
        events = list(
            takewhile(
                lambda item: item[0] != "end_map",
                islice(ijson.basic_parse(file, multiple_values=True, use_float=True), 40),
            )
        )
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    kinds = [kind for kind, _ in events[:4]]
    inner_keys = {value for kind, value in events[4:] if kind == "map_key"}
    if kinds == ["start_map", "map_key", "start_array", "start_map"] and inner_keys & _CAPTION_KEYS:
        return str(events[1][1])
    return None

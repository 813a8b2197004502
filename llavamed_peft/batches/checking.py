"""Checking a data set and writing its index, or finding the one that was written before.

Each conversation is encoded once, with its images' sizes read from their headers. So what cannot be used is
known and counted before training begins, and a worker that prepares a batch has nothing left to do but decode
images.

An index knows what it was made from (a fingerprint of the data files, the processor and the limits), so the
next call with the same data takes it, as long as its SHA-256 is the one in the file next to it. Image files
are not part of the fingerprint: one that changed, vanished or came back is not noticed before it is decoded.
After fixing images, delete the index.

Conversations are grouped for shuffling by the paths of their images, links resolved. What they begin with, by
which steps are packed, is the same for images of equal content.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pyarrow as pa

from ..conversations import Conversation
from ..datasets.rejects import Reject, RejectLog
from ..datasets.sources import Source
from ..errors import DataError
from ..packing.collator import PackedCollator, check_length, token_sequence
from ..packing.encoding import Tokenized
from ..reporting.progress import Progress, Show, named
from ..storage.equal_images import ContentNames, real_path
from ..storage.hashing import file_sha256
from ..storage.images import MAX_PIXELS, image_header
from ..storage.whole import keep, write_file
from .index import FILES, FINGERPRINT, REJECTED, SCHEMA, FileCount, Index, notes, row_number
from .ledger import fault

FORMAT = 4  # goes up with every change of what is checked, how it is encoded, or what the file holds
_TOO_LONG = "longer than max_length"  # a reason, whose detail ends in what it would need (`check_length`)
_ROWS_PER_BATCH = 1000
_FILES_KNOWN = 10_000  # images that need not be looked at again
LONGEST_STRIP = 100  # times its width, of an image that is still shown


def build_index(
    sources: Sequence[Source],
    collator: PackedCollator,
    path: Path,
    rejects: RejectLog,
    max_rejected: float | None,
    show: Show | None = None,
) -> Index:
    """Check every row of the sources and write the usable ones to `path`, unless it holds an index of these
    very data.

    Args:
        collator: its encoder and `max_length` decide what fits.
        rejects: where unusable rows go, each with file, row, id and reason; those of an index that is there,
            again.
        max_rejected: share of the rows above which the data are refused; `None`: whatever there is,
            none included.
        show: takes a line now and then where checking takes long, and one where an index that is there is
            used.

    Raises:
        DataError: a file that cannot be read, too many rejected rows (the commonest reasons are named), or
            none left.

    Warns:
        UserWarning: the index that is there was damaged or not finished; the rows are checked again.
    """
    fingerprint = _fingerprint(sources, collator)
    partial, digest = path.with_suffix(".partial"), path.with_suffix(".sha256")
    found = fingerprint is not None and _is_whole(path, digest) and _is_of(path, fingerprint)
    if found:
        for note in notes(path):
            for reject in note.get(REJECTED, []):
                rejects.append(Reject(**reject))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_index(sources, collator, partial, fingerprint, rejects, show)
    index = Index.open(path if found else partial)
    if max_rejected is not None and (why := fault(index.files, 0, max_rejected)):
        if any(count.rejected for count in index.files):
            needed = _needed_length(path if found else partial)
            longer = f", or give max_length={needed}, which the longest row needs" if needed else ""
            lenient = ", or raise max_rejected" if len(index) else ""
            why += f" Each row is listed in {rejects.path.name}. Fix the data{longer}{lenient}."
        # What is fixed next may be images, which the fingerprint does not know
        for file in (path, partial, digest):
            file.unlink(missing_ok=True)
        raise DataError(why)
    if not found:
        written = file_sha256(partial)
        keep(partial, path)
        write_file(digest, written)  # last: a process that is killed before leaves an index that is not taken
        return Index.open(path)
    if show is not None:
        text = f"{len(index):,} conversations, checked before ({path}; delete it if image files have changed)"
        show(named(path.stem, text), True)
    return index


def _fingerprint(sources: Sequence[Source], collator: PackedCollator) -> str | None:
    """SHA-256 of all that an index depends on, without image files; `None` where a source does not tell."""
    if any(source.settings is None for source in sources):
        return None
    data = [[source.name, source.path, source.sha256, source.settings] for source in sources]
    made_from = [FORMAT, data, collator.encoder.fingerprint(), collator.max_length]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _is_whole(path: Path, digest: Path) -> bool:
    """Whether an index is there as it was written.

    Warns:
        UserWarning: it is there and was changed or not finished.
    """
    if not path.is_file():
        return False
    if digest.is_file() and digest.read_bytes() == file_sha256(path).encode():
        return True
    warnings.warn(f"{path}: was damaged or not finished; its rows are checked again.", stacklevel=3)
    return False


def _is_of(path: Path, fingerprint: str) -> bool:
    """Whether an intact index has this fingerprint."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return (reader.schema.metadata or {}).get(FINGERPRINT) == fingerprint.encode()


def _needed_length(path: Path) -> int:
    """The `max_length` with which no row would be too long; 0 where most rejected rows were rejected for
    something else."""
    rejected, lengths = 0, [0]
    for reject in (reject for note in notes(path) for reject in note.get(REJECTED, [])):
        rejected += 1
        if reject["reason"] == _TOO_LONG:
            lengths.append(int(str(reject["detail"]).rpartition("max_length=")[2].rstrip(".")))
    return max(lengths) if 2 * (len(lengths) - 1) > rejected else 0


def _write_index(
    sources: Sequence[Source],
    collator: PackedCollator,
    path: Path,
    fingerprint: str | None,
    rejects: RejectLog,
    show: Show | None,
) -> None:
    schema = SCHEMA if fingerprint is None else SCHEMA.with_metadata({FINGERPRINT: fingerprint})
    groups: dict[tuple[str, ...], int] = {}
    content_name = functools.lru_cache(_FILES_KNOWN)(ContentNames())
    several_frames: dict[str, int] = {}  # image → how many its file holds
    files: list[FileCount] = []
    progress, seen, refused_in_all = Progress(path.stem, show), 0, 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file, source in enumerate(sources):
            used, rejected = 0, Counter[str]()
            rows = _rows(source)
            while some := list(islice(rows, _ROWS_PER_BATCH)):
                usable: list[dict[str, object]] = []
                refused: list[Reject] = []
                for row in some:
                    checked = (
                        row
                        if isinstance(row, Reject)
                        else _check(row, source.path, collator, content_name, several_frames)
                    )
                    if isinstance(checked, Reject):
                        refused.append(checked)
                        rejects.append(checked)
                    else:
                        key = tuple(map(real_path, checked["images"])) or ("", str(len(groups)))
                        usable.append({**checked, "file": file, "group": groups.setdefault(key, len(groups))})
                notes = {REJECTED: json.dumps([reject.to_dict() for reject in refused])} if refused else None
                writer.write_batch(pa.RecordBatch.from_pylist(usable, schema), notes)
                used += len(usable)
                rejected.update(reject.reason for reject in refused)
                seen, refused_in_all = seen + len(some), refused_in_all + len(refused)
                progress(_checked(progress, seen, refused_in_all))
            files.append(
                FileCount(
                    source.name, source.path, source.sha256, used + rejected.total(), used, dict(rejected)
                )
            )
        writer.write_batch(
            pa.RecordBatch.from_pylist([], schema), {FILES: json.dumps([asdict(count) for count in files])}
        )
    if progress.has_spoken:
        progress(_checked(progress, seen, refused_in_all), last=True)
    if several_frames:
        image, frames = next(iter(several_frames.items()))
        warnings.warn(
            f"{', '.join(source.name for source in sources)}: {len(several_frames):,} image file(s) hold "
            f"several frames, such as {image} ({frames}). The first of each is shown; name another one of a "
            "DICOM file as file.dcm#3.",
            stacklevel=3,
        )


def _checked(progress: Progress, rows: int, rejected: int) -> str:
    return f"{rows:,} rows checked, {rejected:,} rejected, {progress.per_second(rows):,.0f} rows/s"


def _rows(source: Source) -> Iterator[Conversation | Reject]:
    """The source's rows in their order, those that its reader rejects among them."""
    refused: list[Reject] = []
    for conversation in source.read(refused):
        yield from refused
        refused.clear()
        yield conversation
    yield from refused


def _check(
    conversation: Conversation,
    path: str,
    collator: PackedCollator,
    content_name: Callable[[str], str],
    several_frames: dict[str, int],
) -> dict[str, object] | Reject:
    """A row of the index (but for `file` and `group`), or why there is none."""
    reason = "unreadable image"
    try:
        headers = {image: image_header(image) for image in conversation.images}
        sizes = [_bounded(image, headers[image].size) for image in conversation.images]
        several_frames.update({image: h.frames for image, h in headers.items() if h.frames > 1})
        contents = [content_name(image) for image in conversation.images]
        reason = "cannot be encoded"
        tokens = collator.encoder.tokenize(conversation)
        tokenized = Tokenized(conversation.id, conversation.images, conversation.source, tokens)
        counts = collator.encoder.count_image_tokens(sizes)
        encoded = collator.encoder.encode(tokenized, counts)
        reason = _TOO_LONG if len(encoded.input_ids) > collator.max_length else "no supervised token"
        check_length(tokenized, encoded, collator.max_length)
    except DataError as error:
        return Reject(path, row_number(conversation.source), conversation.id, reason, str(error))
    sequence = token_sequence(encoded, contents, counts, collator.encoder)
    return {
        "id": conversation.id,
        "source": conversation.source,
        "images": list(conversation.images),
        "turns": json.dumps([[turn.role, turn.text, turn.supervised] for turn in conversation.turns]),
        "system": conversation.system,
        "token_ids": tokens.ids,
        "supervised": tokens.supervised,
        "length": len(encoded.input_ids),
        "image_tokens": encoded.image_tokens,
        "supervised_tokens": encoded.supervised_tokens,
        "prefix": sequence.prefix_key(),
        "prefix_tokens": sequence.image_prefix,
    }


def _bounded(image: str, size: tuple[int, int]) -> tuple[int, int]:
    """Refuse a strip: padded to a square, or with its short side made as long as a tile's, it would fill the
    memory."""
    long, short = max(size), min(size)
    if long**2 > MAX_PIXELS or long > LONGEST_STRIP * short:
        raise DataError(
            f"{image} is {size[1]} × {size[0]} pixels; wanted a longer side of at most "
            f"{int(MAX_PIXELS**0.5):,} and {LONGEST_STRIP} times the shorter one, since it is padded to a "
            "square."
        )
    return size

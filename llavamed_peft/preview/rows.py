"""What of a data set could be used, and its first rows as the model would see them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from transformers import ProcessorMixin

from ..batches.checking import build_index
from ..batches.index import Index
from ..batches.ledger import fault
from ..datasets.rejects import Reject, RejectLog
from ..datasets.sources import Source
from ..errors import DataError
from ..packing.collator import PackedCollator
from ..packing.encoding import IGNORED
from ..reporting.text import histogram, indented, visible, wrapped

EXAMPLES = 3  # rejected rows that are shown for each reason
_MARKED = "\033[4;32m{}\033[0m"  # underlined, so that spaces show, and green
Piece = tuple[str, bool]  # text, and whether the model learns to write it


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What became of the rows of some files.

    Args:
        index: the usable ones, and what was counted for each file.
        reasons: why others cannot be used → how many, most frequent first.
        examples: reason → the first of them.
    """

    index: Index
    reasons: dict[str, int]
    examples: dict[str, list[Reject]]


# What it would train on


def check_data(sources: Sequence[Source], collator: PackedCollator, folder: Path) -> DataCheck:
    """Check every row as training does, and keep the first examples of what cannot be used.

    Args:
        sources: the data of a stage.
        collator: the stage's.
        folder: where the index and the list of rejected rows may be written.

    Raises:
        DataError: a file that is broken.
    """
    with RejectLog(folder / "rejected.jsonl") as log:
        index = build_index(sources, collator, folder / "index.arrow", log, max_rejected=None)
    examples: dict[str, list[Reject]] = defaultdict(list)
    if log.total:
        with log.path.open(encoding="utf-8") as lines:
            for reject in (Reject(**json.loads(line)) for line in lines):
                if len(examples[reject.reason]) < EXAMPLES:
                    examples[reject.reason].append(reject)
    return DataCheck(index, dict(log.commonest(len(log.counts))), examples)


def accounts(check: DataCheck, max_rejected: float, width: int) -> Iterator[str]:
    for count in check.index.files:
        rejected = sum(count.rejected.values())
        yield f"{visible(count.name)}: {count.rows:,} rows, {count.used:,} used, {rejected:,} rejected"
    for reason, number in check.reasons.items():
        yield f"  {reason}: {number:,}"
        for reject in check.examples[reason]:
            place = f"{Path(reject.file).name}:{reject.row} (id {reject.id}): "
            yield from wrapped(visible(place + reject.detail.removeprefix(place)), width, "    ", "      ")
    if why := fault(check.index.files, 0, max_rejected):
        yield from wrapped(f"training would refuse these data: {visible(why)}", width, "", "  ")


def lengths(index: Index, width: int) -> Iterator[str]:
    if len(index):
        lengths = index.column("length")
        of_images, supervised = (
            index.column("image_tokens").mean(),
            index.column("supervised_tokens").mean(),
        )
        yield (
            f"lengths: {lengths.min():,} to {lengths.max():,} tokens, mean {lengths.mean():,.0f}; of them "
            f"{of_images:,.0f} of images and {supervised:,.0f} supervised"
        )
        yield from indented(2, histogram(lengths, width - 2))


def first_rows(index: Index, collator: PackedCollator, rows: int, width: int, colour: bool) -> Iterator[str]:
    if not len(index) or not rows:
        return
    yield f"the first rows; supervised tokens are {_MARKED.format('like this') if colour else 'in [[ ]]'}"
    for conversation in map(index.conversation, range(min(rows, len(index)))):
        yield f"  {visible(conversation.source)} (id {visible(conversation.id)})"
        try:
            batch = collator([conversation])
        except DataError as error:  # only the header was read before
            yield from wrapped(f"would fail: {visible(str(error))}", width, "    ", "      ")
            continue
        pieces = marked_text(
            collator.encoder.processor, batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        )
        yield from indented(4, _paint(pieces, width - 4, colour))


def marked_text(processor: ProcessorMixin, input_ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """A row as text in stretches, each supervised or not; adjacent image tokens are one `<image>×576`.

    Args:
        input_ids, labels: [tokens], as the model gets them.
    """
    pieces: list[Piece] = []
    shown: list[int] = []
    written = ""
    tokens = zip(input_ids, labels, strict=True)
    for (is_image, supervised), run in groupby(
        tokens, lambda pair: (pair[0] == processor.image_token_id, pair[1] != IGNORED)
    ):
        ids = [token for token, _ in run]
        shown += ids[:1] if is_image else ids
        # From the beginning each time: a tokenizer may write the first token of a text otherwise than the
        # same one inside it.
        text = processor.tokenizer.decode(
            shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        pieces.append((visible(text[len(written) :]) + (f"×{len(ids)}" if is_image else ""), supervised))
        written = text
    return pieces


def _paint(pieces: Sequence[Piece], width: int, colour: bool) -> list[str]:
    """Lines of at most `width` characters, broken after spaces where there are any."""
    if not colour:
        pieces = [(f"[[{text}]]" if supervised else text, False) for text, supervised in pieces]
    characters = [(character, supervised) for text, supervised in pieces for character in text]
    lines = []
    while characters:
        cut = width
        if len(characters) > width:
            cut = next((at for at in range(width, width // 2, -1) if characters[at - 1][0] == " "), width)
        line = ""
        for supervised, run in groupby(characters[:cut], lambda pair: pair[1]):
            text = "".join(character for character, _ in run)
            line += _MARKED.format(text) if supervised else text
        lines.append(line if colour else line.rstrip())
        characters = characters[cut:]
    return lines

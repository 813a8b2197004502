"""A packed step to look at: its rows, what is shared in them, how much of them is useful; text and a picture.

A position is useful if it is neither padding nor part of a prefix that another row of the step has, too. The
step is one process's share of an epoch's first step, laid out by the functions that training uses, without
decoding a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ..batches.index import Index
from ..batches.shares import share_of_step
from ..batches.steps import StepSampler
from ..packing import PackedCollator
from ..packing.encoding import IGNORED
from ..packing.masks import dense_mask
from ..packing.rows import Row, lay_row, lay_rows
from ..packing.tree import Forest, TokenSequence, build_forest
from ..storage.equal_images import content_key
from ..storage.images import image_size

IMAGE, SHARED, OWN, SUPERVISED, NOTHING = range(5)
_NAMES = ("image", "shared words", "a conversation's own words", "supervised", "")
_MARKS = "#=-*"
_COLOURS = ("#4c72b0", "#dd8452", "#c9c9c9", "#c44e52", "#ffffff")
_LEAST_SHOWN = 8  # tokens of a shared segment that has a line of its own
_LARGEST_MASK = 2048  # tokens of a side of the mask that is drawn


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step as it would be computed.

    Args:
        title: whose step it is.
        rows: one device batch each.
        kinds: of each row, [tokens] integers: `IMAGE`, `SHARED`, `OWN` or `SUPERVISED`.
        useful: positions that no layout could do without.
        padded: positions that the padded layout's device batches would take under the same bound.
    """

    title: str
    rows: list[Row]
    kinds: list[np.ndarray]
    useful: int
    padded: int

    @property
    def positions(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))


def first_step(title: str, index: Index, collator: PackedCollator, sampler: StepSampler) -> PackedStep:
    """Lay out an epoch's first step as training would.

    Raises:
        DataError: an image's file is missing.
    """
    step = next(sampler.steps())
    (share,) = sampler.shares(step)
    batches = [[_sequence(index, collator, row) for row in batch] for batch in share]
    rows = [row for batch in batches for row in lay_rows(batch, collator.max_row_tokens)]
    kinds = [_kinds(row, collator.encoder.processor.image_token_id) for row in rows]
    every = [sequence for batch in batches for sequence in batch]
    useful = len(lay_row(build_forest(every), every))  # as one row of any length
    (padded,) = share_of_step(step, sampler.lengths, sampler.max_row_tokens, world_size=1)
    positions = sum(len(batch) * int(sampler.lengths[list(batch)].max()) for batch in padded)
    return PackedStep(title, rows, kinds, useful, positions)


def describe_step(step: PackedStep, width: int) -> Iterator[str]:
    """Lines: the numbers of the step, and of each row a bar and its trees.

    Args:
        width: characters of a bar.
    """
    conversations = sum(len(row.last) for row in step.rows)
    yield (
        f"{step.title}: {conversations:,} conversations in {len(step.rows):,} row(s), {step.positions:,} "
        f"tokens, {step.useful / step.positions:.1%} of them useful; padded "
        f"{step.padded / step.positions:.1f} times as many"
    )
    longest = max(map(len, step.rows))
    for number, (row, kinds) in enumerate(zip(step.rows, step.kinds, strict=True), start=1):
        shape = f"{len(row):,} tokens, {len(row.last):,} conversations, {len(row.images):,} image(s)"
        yield f"  row {number}: {shape}"
        yield "    " + _bar(kinds, max(1, round((width - 4) * len(row) / longest)))
        yield from _trees(row.forest, 4)
    yield "  " + ", ".join(f"{mark} {_NAMES[kind]}" for kind, mark in enumerate(_MARKS))


def draw_steps(steps: Sequence[PackedStep], path: Path) -> None:
    """Draw each step's rows as bars, and beside them the mask of its first row.

    Args:
        path: of the PNG file.
    """
    figure = Figure(figsize=(11, sum(_height(step) for step in steps)), layout="constrained")
    panels = figure.subplots(
        len(steps), 2, squeeze=False, height_ratios=[_height(step) for step in steps], width_ratios=[2, 1]
    )
    for (bars, mask), step in zip(panels, steps, strict=True):
        longest = max(map(len, step.rows))
        image = np.full((len(step.rows), longest), NOTHING)
        for number, kinds in enumerate(step.kinds):
            image[number, : len(kinds)] = kinds
        bars.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(_COLOURS),
            vmin=IMAGE,
            vmax=NOTHING,
        )
        bars.hlines(np.arange(len(step.rows) - 1) + 0.5, -0.5, longest - 0.5, color="white", linewidth=4)
        bars.set_yticks(range(len(step.rows)), [f"{len(row.last)} conv." for row in step.rows])
        bars.set_title(
            f"{step.title}: {step.useful / step.positions:.1%} useful, "
            f"padded {step.padded / step.positions:.1f}×"
        )
        bars.set_xlabel("token of the row")
        ends = torch.from_numpy(step.rows[0].ends[:_LARGEST_MASK])[None]
        mask.imshow(dense_mask(ends)[0, 0], interpolation="nearest", cmap="Greys", vmin=0, vmax=1.4)
        mask.set_title("who sees whom in the first row")
    handles = [
        panels[0, 0].plot([], [], "s", color=_COLOURS[kind], label=_NAMES[kind])[0] for kind in range(NOTHING)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=NOTHING)
    figure.savefig(path, format="png", dpi=120)


def _height(step: PackedStep) -> float:
    return max(3.6, 0.3 * len(step.rows) + 1.2)


def _sequence(index: Index, collator: PackedCollator, row: int) -> TokenSequence:
    conversation = index.tokenized(row)
    contents = [content_key(image) for image in conversation.images]
    return collator.sequence(conversation, contents, [image_size(image) for image in conversation.images])


def _kinds(row: Row, image_token: int) -> np.ndarray:
    """[tokens] integers. A token is shared if several of the row's sequences end in its subtree."""
    last = np.sort(list(row.last.values()))  # [sequences]: the places of their last tokens
    # [tokens]: sequences that end before ends[j], without those that end before j
    sharing = np.searchsorted(last, row.ends) - np.searchsorted(last, np.arange(len(row)))
    kinds = np.where(sharing > 1, SHARED, OWN)
    kinds[row.input_ids == image_token] = IMAGE
    kinds[row.labels != IGNORED] = SUPERVISED
    return kinds


def _bar(kinds: np.ndarray, width: int) -> str:
    """A character for each stretch of a row: its most frequent kind."""
    edges = np.linspace(0, len(kinds), min(width, len(kinds)) + 1).astype(int)
    return "".join(_MARKS[np.bincount(kinds[begin:end]).argmax()] for begin, end in pairwise(edges))


def _trees(forest: Forest, spaces: int) -> Iterator[str]:
    """A line for each long shared segment, those below it indented, and a line for everything else."""
    tokens = ends = 0
    rest = list(forest)
    while rest:
        segment = rest.pop(0)
        own = segment.end - segment.begin
        if segment.children and own >= _LEAST_SHOWN:
            yield f"{' ' * spaces}{own:,} tokens shared by {len(segment.leaves):,}"
            yield from _trees(segment.children, spaces + 2)
        else:
            tokens += own
            ends += not segment.children
            rest[:0] = segment.children
    if ends:
        yield f"{' ' * spaces}{tokens:,} tokens in which {ends:,} end"

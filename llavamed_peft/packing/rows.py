"""Prefix trees → rows: every segment once, in pre-order, so that one number for each token says who sees it.

In pre-order a segment comes before all that continues it, and a subtree is one run of tokens. So token j is
visible to token i exactly if j <= i < ends[j], where ends[j] is where the subtree of j's segment ends. What
token i sees is its own path: nothing of its neighbours and nothing of another tree. Positions count along the
path. `masks.py` makes attention masks of `ends`; the package's docstring draws an example.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .encoding import IGNORED
from .tree import Forest, Segment, TokenSequence, build_forest, split_forest


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Some sequences laid out; what they begin with is there once.

    Args:
        input_ids: [tokens] int64.
        labels: [tokens] int64, not shifted: a supervised token comes right after the token that predicts it.
        positions: [tokens] int64, of each token in its own sequence.
        ends: [tokens] int64; token i sees token j exactly if j <= i < ends[j].
        last: sequence → the place of its last token.
        images: (sequence, which of its images), in the order of their placeholders.
        forest: what was laid out.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    last: dict[int, int]
    images: tuple[tuple[int, int], ...]
    forest: Forest

    def __len__(self) -> int:
        return len(self.input_ids)

    def path(self, sequence: int) -> np.ndarray:
        """The places of a sequence's tokens, in order: what its last token sees."""
        last = self.last[sequence]  # sees place j <= last exactly if ends[j] > last
        return np.flatnonzero(self.ends[: last + 1] > last)


def lay_rows(
    sequences: Sequence[TokenSequence],
    max_row_tokens: int | None = None,
    beginnings: Sequence[Hashable] | None = None,
) -> list[Row]:
    """Lay sequences out in rows; every sequence is complete in one of them.

    Args:
        sequences: each with at least one token.
        max_row_tokens: tokens of a row; a sequence that is longer has a row of its own. `None`: one row, as
            long as it gets.
        beginnings: of each sequence; each beginning gets rows of its own, and so does each sequence whose
            beginning is `None`. `None`: all may be in one row.
    """
    # beginning → sequences; what may not share a row has a key of its own
    groups: dict[Hashable, list[int]] = {}
    for number, beginning in enumerate(beginnings or [""] * len(sequences)):
        groups.setdefault(("alone", number) if beginning is None else beginning, []).append(number)
    forests = [
        forest
        for group in groups.values()
        for forest in split_forest(build_forest(sequences, group), max_row_tokens)
    ]
    return [lay_row(forest, sequences) for forest in forests]


def lay_row(forest: Forest, sequences: Sequence[TokenSequence]) -> Row:
    """Lay trees out one after the other.

    Args:
        forest: of these sequences, not empty.
    """
    pieces: list[tuple[Segment, int]] = []  # in pre-order, each with the place where its subtree ends
    last: dict[int, int] = {}

    def visit(segment: Segment, begin: int) -> None:
        pieces.append((segment, begin + segment.size))
        begin += segment.end - segment.begin  # from here on: the place after the segment's own tokens
        if not segment.children:  # a leaf
            last[segment.sequence] = begin - 1
        for child in segment.children:
            visit(child, begin)
            begin += child.size

    begin = 0
    for tree in forest:
        visit(tree, begin)
        begin += tree.size
    # Each segment is cut from one of the sequences that have it.
    cuts = [(sequences[segment.sequence], slice(segment.begin, segment.end)) for segment, _ in pieces]
    positions = np.concatenate([np.arange(segment.begin, segment.end) for segment, _ in pieces])
    labels = np.concatenate([sequence.labels[cut] for sequence, cut in cuts])
    return Row(
        input_ids=np.concatenate([sequence.input_ids[cut] for sequence, cut in cuts]),
        # The token before a tree's first one belongs to another tree: it does not predict it.
        labels=np.where(positions == 0, IGNORED, labels),
        positions=positions,
        # Every token of a segment is visible until the segment's subtree ends.
        ends=np.concatenate([np.full(segment.end - segment.begin, end) for segment, end in pieces]),
        last=last,
        images=tuple(
            (segment.sequence, number)
            for segment, _ in pieces
            for number, span in enumerate(sequences[segment.sequence].images)  # no image is cut by a segment
            if segment.begin <= span.begin < segment.end
        ),
        forest=forest,
    )

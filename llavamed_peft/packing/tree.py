"""Token sequences → prefix trees, in which what several conversations begin with stands once; trees → bins of
a bounded size.

Conversations agree from their first token on or not at all: a segment is a run of tokens that all
conversations below it have in common, a leaf is what one conversation has alone. Only what lies before the
token that predicts a conversation's first supervised one is shared. Hugging Face's labels keep their shift
that way (a supervised token stands right behind the token that predicts it), and what is asked twice counts
twice. Image placeholders are the same where image and place in it are the same.

Numpy only; `rows.py` lays the segments out. Left out: what is the same further back, such as one image behind
two different texts, since every token's state depends on all before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .encoding import IGNORED

DEEPEST = 100  # segments on a path; what is deeper still stands once for each of its sequences


class ImageSpan(NamedTuple):
    """An image's placeholders in a conversation: tokens `begin` to `end` (exclusive); equal `content` is the
    same image."""

    content: Hashable
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One conversation's tokens.

    Args:
        input_ids: [tokens] int64.
        labels: [tokens] int64, `input_ids` where supervised, else -100; not shifted.
        images: in the order in which they stand.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageSpan, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def shareable(self) -> int:
        """Tokens, from the first on, that others may stand on: those before the first supervised token's
        predictor.

        The first token counts as unsupervised, since nothing predicts it; an image is shared whole.
        """
        supervised = np.flatnonzero(self.labels[1:] != IGNORED) + 1
        shareable = max(int(supervised[0]) if len(supervised) else len(self), 1) - 1
        return next((span.begin for span in self.images if span.begin < shareable < span.end), shareable)

    @property
    def image_prefix(self) -> int:
        """Tokens up to the end of its last shareable image, which is most of what can be shared; 0 without
        one."""
        return max((span.end for span in self.images if span.end <= self.shareable), default=0)

    def prefix_key(self) -> int:
        """A number of 64 bits, equal for sequences whose `image_prefix` tokens are the same."""
        end = self.image_prefix
        images = [span for span in self.images if span.end <= end]
        digest = hashlib.blake2b(f"{self.input_ids[:end].tolist()} {images}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that stands once, and all that goes on from it.

    Args:
        sequence: the sequence it is cut from; where several share it, the first of them.
        begin, end: its tokens in that sequence, `end` exclusive; also its positions.
        children: what follows it; a leaf has none and ends its sequence.
    """

    sequence: int
    begin: int
    end: int
    children: tuple[Segment, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the segment and all below it."""
        return self.end - self.begin + sum(child.size for child in self.children)

    @property
    def leaves(self) -> list[int]:
        """The sequences that end here or below, in order."""
        return [leaf for child in self.children for leaf in child.leaves] or [self.sequence]


Forest = tuple[Segment, ...]


def build_forest(sequences: Sequence[TokenSequence], members: Sequence[int] | None = None) -> Forest:
    """Prefix trees of some sequences: no two trees begin with the same token that could be shared.

    Args:
        members: which of the sequences; `None`: all.

    Example:
        >>> sequence = lambda *ids: TokenSequence(np.array(ids), np.array([IGNORED] * (len(ids) - 1) + [ids[-1]]))
        >>> print(*describe(build_forest([sequence(1, 2, 3, 4, 5), sequence(1, 2, 6, 7), sequence(8, 9)])), sep="\\n")
        0-2: 2 tokens shared by 2
          2-5: 3 tokens of sequence 0
          2-4: 2 tokens of sequence 1
        0-2: 2 tokens of sequence 2
    """
    members = range(len(sequences)) if members is None else members
    keys = dict(zip(members, _keys([sequences[member] for member in members]), strict=True))
    shareable = {member: sequences[member].shareable for member in members}

    def grow(members: Sequence[int], begin: int, depth: int) -> Forest:
        """The trees of sequences that are the same before `begin`, in the order of their first members."""
        alike: dict[Hashable, list[int]] = {}
        for member in members:
            alone = shareable[member] <= begin or depth == DEEPEST
            alike.setdefault(("alone", member) if alone else int(keys[member][begin]), []).append(member)
        segments = []
        for group in alike.values():
            if len(group) == 1:
                segments.append(Segment(group[0], begin, len(keys[group[0]])))
            else:
                end = begin + _common([keys[member][begin : shareable[member]] for member in group])
                segments.append(Segment(group[0], begin, end, grow(group, end, depth + 1)))
        return tuple(segments)

    return grow(members, 0, depth=1)


def split_forest(forest: Forest, max_tokens: int | None) -> list[Forest]:
    """Cut a forest into such that fit a row: each at most `max_tokens` tokens, every sequence whole in one of
    them.

    A tree that does not fit is cut by repeating its prefix. A sequence that is longer by itself stands alone.
    `None` cuts nothing.
    """
    if max_tokens is None:
        return [forest] if forest else []
    parts = [part for segment in forest for part in _split(segment, max_tokens)]
    return [
        tuple(parts[i] for i in chosen) for chosen in first_fit([part.size for part in parts], max_tokens)
    ]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items into bins, the largest first, each into the first bin with room; one that fits none has a bin of
    its own.

    Returns:
        The items of each bin, in order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = next((place for place, free in enumerate(room) if sizes[item] <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return [sorted(items) for items in bins]


def describe(forest: Forest, depth: int = 0) -> Iterator[str]:
    """A line for each segment, those below it indented."""
    for segment in forest:
        owner = f"shared by {len(segment.leaves)}" if segment.children else f"of sequence {segment.sequence}"
        yield f"{'  ' * depth}{segment.begin}-{segment.end}: {segment.end - segment.begin} tokens {owner}"
        yield from describe(segment.children, depth + 1)


def _split(segment: Segment, max_tokens: int) -> list[Segment]:
    """Trees that fit a row together with what leads to them, `segment.begin` tokens."""
    if segment.begin + segment.size <= max_tokens or not segment.children:
        return [segment]
    parts = [part for child in segment.children for part in _split(child, max_tokens)]
    bins = first_fit([part.size for part in parts], max_tokens - segment.end)
    return [
        replace(segment, sequence=parts[chosen[0]].sequence, children=tuple(parts[i] for i in chosen))
        for chosen in bins
    ]


def _keys(sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    """[tokens] int64 each: a token's id; of a placeholder a negative number that belongs to its image and its
    place in it."""
    first_key: dict[Hashable, int] = {}
    free = 0
    keys = []
    for sequence in sequences:
        own = np.array(sequence.input_ids, dtype=np.int64)
        for content, begin, end in sequence.images:
            if (content, end - begin) not in first_key:
                first_key[content, end - begin] = free
                free += end - begin
            own[begin:end] = -1 - first_key[content, end - begin] - np.arange(end - begin)
        keys.append(own)
    return keys


def _common(runs: Sequence[np.ndarray]) -> int:
    """How many elements, from the first on, are the same in all of them."""
    length = min(len(run) for run in runs)
    differ = np.zeros(length, dtype=bool)
    for run in runs[1:]:
        differ |= run[:length] != runs[0][:length]
    return int(differ.argmax()) if differ.any() else length

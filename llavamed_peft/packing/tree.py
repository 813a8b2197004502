"""Token sequences → prefix trees, which hold what several conversations begin with only once; trees → bins.

Two conversations agree from their first token on or not at all. A segment is a run of tokens that all
conversations below it have in common; a leaf is what one conversation has alone. Only tokens before the one
that predicts a conversation's first supervised token are shared. So the labels of Hugging Face keep their
shift (a supervised token comes right after the token that predicts it), and what is asked twice counts twice.
Image placeholders are equal if their image and their place in it are.

Numpy only; `rows.py` lays the segments out. Not shared: what is equal later in two conversations, such as one
image after two different texts, since the state of every token depends on all tokens before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .encoding import IGNORED

DEEPEST = 100  # segments on a path; anything deeper is not shared, but repeated for each sequence


class ImageSpan(NamedTuple):
    """An image's placeholders in a conversation: tokens `begin` to `end` (exclusive).

    Equal `content` is the same image.
    """

    content: Hashable
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One conversation's tokens.

    Args:
        input_ids: [tokens] int64.
        labels: [tokens] int64, `input_ids` where supervised, else -100; not shifted.
        images: in the order of their placeholders.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageSpan, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def shareable(self) -> int:
        """How many of the first tokens may be shared: those before the first supervised token's predictor.

        The first token counts as unsupervised, since nothing predicts it. An image is shared completely or
        not at all.
        """
        supervised = np.flatnonzero(self.labels[1:] != IGNORED) + 1  # places of supervised tokens, ascending
        # Place p is predicted at p - 1; tokens before that may be shared. Without labels, all but the last.
        shareable = max(int(supervised[0]) if len(supervised) else len(self), 1) - 1
        # An image that the bound would cut is left out.
        return next((span.begin for span in self.images if span.begin < shareable < span.end), shareable)

    @property
    def image_prefix(self) -> int:
        """Tokens up to the end of its last shareable image: most of what can be shared; 0 without one."""
        return max((span.end for span in self.images if span.end <= self.shareable), default=0)

    def prefix_key(self) -> int:
        """A number of 64 bits, equal for sequences whose `image_prefix` tokens are the same."""
        end = self.image_prefix  # tokens
        images = [span for span in self.images if span.end <= end]
        # Placeholders of all images have one id, so the images themselves are part of the key.
        digest = hashlib.blake2b(f"{self.input_ids[:end].tolist()} {images}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that is there once, and all segments that continue it.

    Args:
        sequence: the sequence it is cut from; where several share it, the first of them.
        begin, end: its tokens in that sequence, `end` exclusive; also their positions.
        children: what continues it; a leaf has none and ends its sequence.
    """

    sequence: int
    begin: int
    end: int
    children: tuple[Segment, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of the segment and of all below it."""
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
        >>> def sequence(*ids):
        ...     return TokenSequence(np.array(ids), np.array([IGNORED] * (len(ids) - 1) + [ids[-1]]))
        >>> given = [sequence(1, 2, 3, 4, 5), sequence(1, 2, 6, 7), sequence(8, 9)]
        >>> print(*describe(build_forest(given)), sep="\\n")
        0-2: 2 tokens shared by 2
          2-5: 3 tokens of sequence 0
          2-4: 2 tokens of sequence 1
        0-2: 2 tokens of sequence 2
    """
    # Keys decide what is equal; the bound of what may be shared is each sequence's own.
    members = range(len(sequences)) if members is None else members
    keys = dict(zip(members, _keys([sequences[member] for member in members]), strict=True))
    shareable = {member: sequences[member].shareable for member in members}

    def grow(members: Sequence[int], begin: int, depth: int) -> Forest:
        """The trees of sequences that are equal before `begin`, in the order of their first members."""
        alike: dict[Hashable, list[int]] = {}  # by the next token; a sequence that may share no more is alone
        for member in members:
            alone = shareable[member] <= begin or depth == DEEPEST
            alike.setdefault(("alone", member) if alone else int(keys[member][begin]), []).append(member)
        segments = []
        for group in alike.values():
            if len(group) == 1:
                # A leaf: the rest of its sequence.
                segments.append(Segment(group[0], begin, len(keys[group[0]])))
            else:
                # They share one token at least, the one they were grouped by; at most what all may share.
                end = begin + _common([keys[member][begin : shareable[member]] for member in group])
                segments.append(Segment(group[0], begin, end, grow(group, end, depth + 1)))
        return tuple(segments)

    return grow(members, 0, depth=1)


def split_forest(forest: Forest, max_tokens: int | None) -> list[Forest]:
    """Cut a forest into forests that fit a row, each of at most `max_tokens` tokens.

    Every sequence is complete in one of them. A tree that does not fit is cut by repeating its prefix. A
    sequence that is longer by itself is alone. `None` cuts nothing.
    """
    if max_tokens is None:
        return [forest] if forest else []
    parts = [part for segment in forest for part in _split(segment, max_tokens)]
    return [
        tuple(parts[i] for i in chosen) for chosen in first_fit([part.size for part in parts], max_tokens)
    ]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins, the largest first, each into the first bin with room.

    An item that fits into no bin has one of its own.

    Returns:
        The items of each bin, in order.
    """
    bins: list[list[int]] = []
    room: list[int] = []  # of each bin, what is free
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        # The first bin with room; else a new one, which may be smaller than the item.
        place = next((place for place, free in enumerate(room) if sizes[item] <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return [sorted(items) for items in bins]


def describe(forest: Forest, depth: int = 0) -> Iterator[str]:
    """A line for each segment; those below it are indented."""
    for segment in forest:
        owner = f"shared by {len(segment.leaves)}" if segment.children else f"of sequence {segment.sequence}"
        yield f"{'  ' * depth}{segment.begin}-{segment.end}: {segment.end - segment.begin} tokens {owner}"
        yield from describe(segment.children, depth + 1)


def _split(segment: Segment, max_tokens: int) -> list[Segment]:
    """Trees that fit a row together with the `segment.begin` tokens that lead to them."""
    if segment.begin + segment.size <= max_tokens or not segment.children:
        return [segment]
    parts = [part for child in segment.children for part in _split(child, max_tokens)]
    # Each bin repeats the segment and what leads to it, `segment.end` tokens; the rest of a row is for parts.
    bins = first_fit([part.size for part in parts], max_tokens - segment.end)
    return [
        replace(segment, sequence=parts[chosen[0]].sequence, children=tuple(parts[i] for i in chosen))
        for chosen in bins
    ]


def _keys(sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    """Of each sequence, [tokens] int64: numbers that are equal exactly where tokens may be shared.

    A token's id; for a placeholder a negative number that belongs to its image and its place in it.
    """
    first_key: dict[Hashable, int] = {}  # (content, tokens) of an image → the number of its first placeholder
    free = 0  # numbers below are in use
    keys = []
    for sequence in sequences:
        own = np.array(sequence.input_ids, dtype=np.int64)
        for content, begin, end in sequence.images:
            if (content, end - begin) not in first_key:
                first_key[content, end - begin] = free
                free += end - begin
            # Placeholder k of an image whose numbers begin at f is -1 - f - k.
            own[begin:end] = -1 - first_key[content, end - begin] - np.arange(end - begin)
        keys.append(own)
    return keys


def _common(runs: Sequence[np.ndarray]) -> int:
    """How many of the first elements are equal in all runs."""
    length = min(len(run) for run in runs)
    differ = np.zeros(length, dtype=bool)  # [length]: some run differs from the first one here
    for run in runs[1:]:
        differ |= run[:length] != runs[0][:length]
    return int(differ.argmax()) if differ.any() else length

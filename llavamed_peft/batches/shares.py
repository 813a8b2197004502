"""A step's conversations dealt out to processes, in device batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ..packing.tree import first_fit
from .bins import alike, even

DeviceBatch = tuple[int, ...]  # rows of the index


class Prefixes(NamedTuple):
    """What conversations begin with, up to their last image before the first answer.

    keys: [conversations], equal numbers for equal beginnings.
    tokens: [conversations], how long they are; 0 for a conversation without an image.
    """

    keys: np.ndarray
    tokens: np.ndarray


def share_of_step(
    step: Sequence[int], lengths: np.ndarray, max_row_tokens: int, world_size: int
) -> list[list[DeviceBatch]]:
    """Deal a step's conversations to the processes and cut each share into device batches.

    Sorted by length and dealt back and forth, every process gets about the same number of tokens; neighbours
    in length share a device batch, so that little is padded.
    """
    ordered = sorted(step, key=lambda row: (-int(lengths[row]), int(row)))  # the longest first
    hands: list[list[int]] = [[] for _ in range(world_size)]  # back and forth: 0 1 2 2 1 0 0 1 2 …
    for position, row in enumerate(ordered):
        turn, place = divmod(position, world_size)
        hands[place if turn % 2 == 0 else world_size - 1 - place].append(int(row))
    shares = [_cut(hand, lengths, max_row_tokens) for hand in hands]
    # As many device batches for each process: gradients are reduced after each, and all must take part.
    most = max(len(share) for share in shares)
    return [share + [()] * (most - len(share)) for share in shares]


def _cut(rows: list[int], lengths: np.ndarray, max_row_tokens: int) -> list[DeviceBatch]:
    batches: list[DeviceBatch] = []
    while rows:
        fitting = max(1, max_row_tokens // int(lengths[rows[0]]))
        batches.append(tuple(rows[:fitting]))
        rows = rows[fitting:]
    return batches


def packed_share_of_step(
    step: Sequence[int],
    lengths: np.ndarray,
    prefixes: Prefixes,
    max_row_tokens: int,
    fill_tokens: int | None,
    world_size: int,
) -> list[list[DeviceBatch]]:
    """Deal a step's conversations to the processes in rows of at most `max_row_tokens` tokens.

    Conversations with the same beginning stay together, so that it is there once; it is repeated only where
    they are longer than a row. No process waits for a much longer one unless few images make a large step:
    cutting their conversations apart would cost more than it saves.

    Returns:
        [processes][device batches] rows of the index; as many device batches for each process, some empty.
    """
    # Beginning → the conversations of the step that have it. Without an image, a conversation is by itself.
    alike: dict[Hashable, list[int]] = {}
    for conversation in map(int, step):
        prefix = int(prefixes.tokens[conversation])
        key = (int(prefixes.keys[conversation]), prefix) if prefix else conversation
        alike.setdefault(key, []).append(conversation)
    # A lot is what is laid out together: conversations with one beginning, as many as fit a row.
    lots: list[list[int]] = []
    sizes: list[int] = []  # tokens of each lot, its beginning counted once
    for together in alike.values():
        prefix = int(prefixes.tokens[together[0]])
        branches = [int(lengths[conversation]) - prefix for conversation in together]
        for chosen in first_fit(branches, max_row_tokens - prefix):
            lots.append([together[i] for i in chosen])
            sizes.append(prefix + sum(branches[i] for i in chosen))
    if fill_tokens is None:
        shares = _share_rows(sizes, max_row_tokens, world_size)
    else:
        masked = [len(lot) > 1 for lot in lots]  # a single conversation needs no mask but the causal one
        shares = _share_lots(sizes, masked, max_row_tokens, min(fill_tokens, max_row_tokens), world_size)
    return [
        [tuple(conversation for lot in sorted(batch) for conversation in lots[lot]) for batch in share]
        for share in shares
    ]


def _share_rows(sizes: Sequence[int], max_row_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Each process's device batches of lots, each batch one row: about as few rows as hold all lots, as many
    for each process."""
    rows, loads = even(sizes, max_row_tokens, world_size)  # loads: tokens of each row
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    costs = [0] * world_size
    # The longest row first, to a process with the fewest rows; of several, to the one with the fewest tokens.
    for row in sorted(range(len(rows)), key=lambda row: -loads[row]):
        fewest = min(map(len, shares))
        process = min((p for p in range(world_size) if len(shares[p]) == fewest), key=lambda p: costs[p])
        shares[process].append(rows[row])
        costs[process] += loads[row]
    return shares


def _share_lots(
    sizes: Sequence[int], masked: Sequence[bool], max_row_tokens: int, fill_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """Each process's device batches of lots, each lot one row: about as many tokens for each, rows of one
    length together."""
    hands, _ = even(sizes, sum(sizes), world_size)
    shares = [
        alike([lot for lot in hand if masked[lot]], sizes, fill_tokens)
        + alike([lot for lot in hand if not masked[lot]], sizes, max_row_tokens)
        for hand in hands
    ]
    most = max(map(len, shares))
    return [share + [[]] * (most - len(share)) for share in shares]

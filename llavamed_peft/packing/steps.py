"""Which conversations make which optimizer step, on which process, in which device batches.

Everything is worked out from lengths and images alone, the same on every process and after an interruption: an epoch's order
is a function of the seed and the epoch's number. Each step has exactly `global_batch` conversations (the last of an epoch what
is left), whatever the number of processes and however they are cut into device batches.

Packed, a device batch is one row, or (off CUDA) several of about one length. It is planned before any token is read, from how
long each conversation is and what it begins with up to its image; what else is shared, such as a question asked twice, makes a
row a little shorter than planned.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..stages import Schedule, Stage
from .tree import first_fit

DeviceBatch = tuple[int, ...]  # rows of the index
ANOTHER_BATCH = 128  # tokens whose work costs a small model about as much as one device batch more (benchmarks/LOG.md)


class Prefixes(NamedTuple):
    """What conversations begin with, up to their last image before the first answer.

    keys: [conversations], equal numbers for equal beginnings.
    tokens: [conversations], how long they are; 0 for a conversation without an image.
    """

    keys: np.ndarray
    tokens: np.ndarray


def steps_in_all(steps_per_epoch: int, schedule: Schedule) -> int:
    """Optimizer steps of a whole stage, as the Hugging Face trainer counts them: a part of an epoch ends behind a whole step."""
    return math.ceil(steps_per_epoch * schedule.epochs)


def why_nothing_is_learnt(stage: Stage, steps_per_epoch: int, images: int) -> str | None:
    """Why a stage would stay where it began; `None` where it would not.

    Args:
        images: that its conversations show, in all.
    """
    if steps_in_all(steps_per_epoch, stage.schedule) == 1 and stage.schedule.warmup_ratio > 0:
        return (
            "warm-up begins at rate 0, and there is one optimizer step. Give it more data or epochs, a smaller global_batch, "
            "or warmup_ratio=0."
        )
    if stage.trains == "projector" and images == 0:
        return "it trains the projector alone, and not one of its conversations shows an image. Give it such that do."
    return None


class StepSampler(Sampler[list[DeviceBatch]]):
    """Deals an epoch out in optimizer steps; one item is one process's share of one step, a list of device batches.

    Every process gets the same number of device batches in a step, some of them empty, so that none waits for another.

    Args:
        lengths: [conversations], tokens of each.
        groups: [conversations], equal numbers for conversations about the same images.
        schedule: `global_batch` and `shuffle` are read.
        max_row_tokens: a device batch has rows × longest of at most this many tokens; a conversation longer than it stands
            alone.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        prefixes: what the conversations begin with, for the packed layout; `None`: the padded one.
        fill_tokens: packed: `None`: a device batch is one row, filled up to its bound. Else what shares no beginning stands in
            rows of its own, and rows of about one length make a device batch, of at most this many tokens where they need a mask.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        groups: np.ndarray,
        schedule: Schedule,
        max_row_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefixes: Prefixes | None = None,
        fill_tokens: int | None = None,
    ):
        self.lengths = np.asarray(lengths)
        self.groups = np.asarray(groups)
        self.schedule = schedule
        self.max_row_tokens = max_row_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.prefixes = prefixes
        self.fill_tokens = fill_tokens
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.schedule.global_batch)

    def __iter__(self) -> Iterator[list[DeviceBatch]]:
        for step in self.steps():
            yield self.shares(step)[self.rank]

    def shares(self, step: Sequence[int]) -> list[list[DeviceBatch]]:
        """Every process's device batches of one step."""
        if self.prefixes is None:
            return share_of_step(step, self.lengths, self.max_row_tokens, self.world_size)
        return packed_share_of_step(step, self.lengths, self.prefixes, self.max_row_tokens, self.fill_tokens, self.world_size)

    def steps(self) -> Iterator[np.ndarray]:
        """The epoch's steps: rows of the index, `global_batch` of them each."""
        order = shuffled(self.groups, self.schedule.shuffle, self.seed, self.epoch)
        for begin in range(0, len(order), self.schedule.global_batch):
            yield order[begin : begin + self.schedule.global_batch]


def shuffled(groups: np.ndarray, shuffle: str, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order of the conversations: plain, or image by image with each image's conversations together and in turn."""
    generator = np.random.default_rng([seed, epoch])
    if shuffle == "conversations":
        return generator.permutation(len(groups))
    rank_of_group = generator.permutation(int(groups.max()) + 1)[groups]
    within = generator.permutation(len(groups))
    return np.lexsort((within, rank_of_group))


def share_of_step(step: Sequence[int], lengths: np.ndarray, max_row_tokens: int, world_size: int) -> list[list[DeviceBatch]]:
    """Deal a step's conversations to the processes and cut each share into device batches.

    Sorted by length and dealt to and fro, every process gets about the same number of tokens; neighbours in length share a
    device batch, so that little is padded.
    """
    ordered = sorted(step, key=lambda row: (-int(lengths[row]), int(row)))
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for position, row in enumerate(ordered):
        turn, place = divmod(position, world_size)
        hands[place if turn % 2 == 0 else world_size - 1 - place].append(int(row))
    shares = [_cut(hand, lengths, max_row_tokens) for hand in hands]
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

    Conversations with one beginning stay together, so that it stands once; only where they are longer than a row it is repeated.
    No process waits for a much longer one unless few images make a large step: cutting their conversations apart would cost more
    than it saves.
    """
    alike: dict[Hashable, list[int]] = {}
    for conversation in map(int, step):
        prefix = int(prefixes.tokens[conversation])
        key = (int(prefixes.keys[conversation]), prefix) if prefix else conversation
        alike.setdefault(key, []).append(conversation)
    lots: list[list[int]] = []
    sizes: list[int] = []
    for together in alike.values():
        prefix = int(prefixes.tokens[together[0]])
        branches = [int(lengths[conversation]) - prefix for conversation in together]
        for chosen in first_fit(branches, max_row_tokens - prefix):
            lots.append([together[i] for i in chosen])
            sizes.append(prefix + sum(branches[i] for i in chosen))
    if fill_tokens is None:
        shares = _share_rows(sizes, max_row_tokens, world_size)
    else:
        masked = [len(lot) > 1 for lot in lots]
        shares = _share_lots(sizes, masked, max_row_tokens, min(fill_tokens, max_row_tokens), world_size)
    return [[tuple(conversation for lot in sorted(batch) for conversation in lots[lot]) for batch in share] for share in shares]


def _share_rows(sizes: Sequence[int], max_row_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Each process's device batches of lots, each batch one row: about as few rows as hold all lots, as many for each process."""
    rows, loads = _even(sizes, max_row_tokens, world_size)
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    costs = [0] * world_size
    for row in sorted(range(len(rows)), key=lambda row: -loads[row]):
        fewest = min(map(len, shares))
        process = min((p for p in range(world_size) if len(shares[p]) == fewest), key=lambda p: costs[p])
        shares[process].append(rows[row])
        costs[process] += loads[row]
    return shares


def _share_lots(
    sizes: Sequence[int], masked: Sequence[bool], max_row_tokens: int, fill_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """Each process's device batches of lots, each lot one row: about as many tokens for each, rows of one length together."""
    hands, _ = _even(sizes, sum(sizes), world_size)
    shares = [
        _alike([lot for lot in hand if masked[lot]], sizes, fill_tokens)
        + _alike([lot for lot in hand if not masked[lot]], sizes, max_row_tokens)
        for hand in hands
    ]
    most = max(map(len, shares))
    return [share + [[]] * (most - len(share)) for share in shares]


def _alike(items: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items of about one size into bins, each taking up as much as its bin's largest: as little in all as can be had.

    Args:
        items: which of the sizes.
        sizes: of the items.
        capacity: of a bin; an item that is larger has its own.
    """
    ordered = sorted(items, key=lambda item: -sizes[item])
    costs, begins = [0], [0]  # of the first items, in bins as good as can be; where the last of those bins begins
    for end in range(1, len(ordered) + 1):
        possible: list[tuple[int, int]] = []
        for begin in reversed(range(end)):
            takes = (end - begin) * sizes[ordered[begin]]
            if takes > capacity and possible:
                break
            possible.append((costs[begin] + takes + ANOTHER_BATCH, begin))
        cost, begin = min(possible)
        costs.append(cost)
        begins.append(begin)
    bins: list[list[int]] = []
    end = len(ordered)
    while end:
        bins.append(ordered[begins[end] : end])
        end = begins[end]
    return bins[::-1]


def _even(sizes: Sequence[int], capacity: int, multiple: int) -> tuple[list[list[int]], list[int]]:
    """Items into about as few bins as hold them, a multiple of some number, all about equally full; one too large has its own.

    Returns:
        The items of each bin, and their sum.
    """
    largest_first = sorted(range(len(sizes)), key=lambda item: -sizes[item])

    def fill(number: int) -> tuple[list[list[int]], list[int]]:
        """Each item into the emptiest bin, the largest first."""
        bins: list[list[int]] = [[] for _ in range(number)]
        loads = [0] * number
        emptiest = [(0, place) for place in range(number)]
        for item in largest_first:
            _, place = heapq.heappop(emptiest)
            bins[place].append(item)
            loads[place] += sizes[item]
            heapq.heappush(emptiest, (loads[place], place))
        return bins, loads

    def hold(number: int) -> bool:
        bins, loads = fill(number * multiple)
        return all(load <= capacity or len(items) == 1 for items, load in zip(bins, loads, strict=True))

    large = sum(2 * size > capacity for size in sizes)  # no two of them share a bin
    least = max(1, large, -(-sum(min(size, capacity) for size in sizes) // capacity))
    least, most = -(-least // multiple), max(1, -(-len(sizes) // multiple))
    number = bisect.bisect_left(range(most), True, lo=min(least, most) - 1, key=lambda bins: hold(bins + 1)) + 1
    return fill(min(number, most) * multiple)

"""Which conversations make which optimizer step, on which process, in which device batches.

Everything is worked out from lengths and images alone, the same on every process and after an interruption: an epoch's order
is a function of the seed and the epoch's number. Each step has exactly `global_batch` conversations (the last of an epoch what
is left), whatever the number of processes and however they are cut into device batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..stages import Schedule

DeviceBatch = tuple[int, ...]  # rows of the index


def steps_in_all(steps_per_epoch: int, schedule: Schedule) -> int:
    """Optimizer steps of a whole stage, as the Hugging Face trainer counts them: a part of an epoch ends behind a whole step."""
    return math.ceil(steps_per_epoch * schedule.epochs)


def learns_nothing(steps_per_epoch: int, schedule: Schedule) -> bool:
    """Warm-up begins at rate 0, so a stage of one optimizer step stays where it began."""
    return steps_per_epoch * schedule.epochs <= 1 and schedule.warmup_ratio > 0


class StepSampler(Sampler[list[DeviceBatch]]):
    """Deals an epoch out in optimizer steps; one item is one process's share of one step, a list of device batches.

    Every process gets the same number of device batches in a step, some of them empty, so that none waits for another.

    Args:
        lengths: [conversations], tokens of each.
        groups: [conversations], equal numbers for conversations about the same images.
        schedule: `global_batch` and `shuffle` are read.
        max_row_tokens: a device batch has rows × longest of at most this many tokens; a conversation longer than it stands alone.
        seed: of the order.
        rank, world_size: this process, and how many there are.
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
    ):
        self.lengths = np.asarray(lengths)
        self.groups = np.asarray(groups)
        self.schedule = schedule
        self.max_row_tokens = max_row_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.schedule.global_batch)

    def __iter__(self) -> Iterator[list[DeviceBatch]]:
        for step in self.steps():
            yield share_of_step(step, self.lengths, self.max_row_tokens, self.world_size)[self.rank]

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

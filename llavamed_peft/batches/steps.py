"""Which conversations make which optimizer step, on which process, in which device batches.

All of it follows from lengths and images alone, so it is the same on every process and after an interruption:
an epoch's order is a function of the seed and the epoch's number. Each step has exactly `global_batch`
conversations (the last of an epoch has the rest), whatever the number of processes and however they are cut
into device batches.

Packed, a device batch is one row, or (without CUDA) several of about the same length. It is planned before
any token is read, from the length of each conversation and from what it begins with up to its image. What
else is shared, such as a question asked twice, makes a row a little shorter than planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from ..stages import Schedule, Stage
from .shares import DeviceBatch, Prefixes, packed_share_of_step, share_of_step


def steps_in_all(steps_per_epoch: int, schedule: Schedule) -> int:
    """Optimizer steps of a stage, as the Hugging Face trainer counts them: part of a step counts as one."""
    return math.ceil(steps_per_epoch * schedule.epochs)


def why_nothing_is_learnt(stage: Stage, steps_per_epoch: int, images: int) -> str | None:
    """Why a stage would stay where it began; `None` where it would not.

    Args:
        images: that its conversations show, in all.
    """
    if steps_in_all(steps_per_epoch, stage.schedule) == 1 and stage.schedule.warmup_ratio > 0:
        return (
            "warm-up begins at rate 0, and there is one optimizer step. Give it more data or epochs, a "
            "smaller global_batch, or warmup_ratio=0."
        )
    if stage.trains == "projector" and images == 0:
        return (
            "it trains the projector alone, and not one of its conversations shows an image. Give it data "
            "with images."
        )
    return None


class StepSampler(Sampler[list[DeviceBatch]]):
    """Deals an epoch out in optimizer steps; one item is one process's share of one step, a list of device
    batches.

    Every process gets the same number of device batches in a step, some of them empty, so that none waits for
    another.

    Args:
        lengths: [conversations], tokens of each.
        groups: [conversations], equal numbers for conversations about the same images.
        schedule: `global_batch` and `shuffle` are read.
        max_row_tokens: a device batch has rows × longest of at most this many tokens; a conversation longer
            than it is alone in one.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        prefixes: what the conversations begin with, for the packed layout; `None`: the padded one.
        fill_tokens: packed: `None`: a device batch is one row, filled up to its bound. Otherwise
            conversations that share no beginning are in different rows, and rows of about the same length
            make a device batch, of at most this many tokens where they need a mask.
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
        return packed_share_of_step(
            step, self.lengths, self.prefixes, self.max_row_tokens, self.fill_tokens, self.world_size
        )

    def steps(self) -> Iterator[np.ndarray]:
        """The epoch's steps: rows of the index, `global_batch` of them each."""
        order = shuffled(self.groups, self.schedule.shuffle, self.seed, self.epoch)
        for begin in range(0, len(order), self.schedule.global_batch):
            yield order[begin : begin + self.schedule.global_batch]


def shuffled(groups: np.ndarray, shuffle: str, seed: int, epoch: int) -> np.ndarray:
    """An epoch's order of the conversations: plain, or image by image with each image's conversations
    together and in turn."""
    generator = np.random.default_rng([seed, epoch])  # nothing else: the same order after an interruption
    if shuffle == "conversations":
        return generator.permutation(len(groups))
    rank_of_group = generator.permutation(int(groups.max()) + 1)[groups]  # [conversations]
    within = generator.permutation(len(groups))
    return np.lexsort((within, rank_of_group))  # by image; the conversations of an image in random order

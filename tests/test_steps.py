"""Steps: each conversation once an epoch, exactly `global_batch` of them a step, the same on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamed_peft import Schedule
from llavamed_peft.packing.steps import StepSampler, share_of_step, shuffled


def sampler(lengths: list[int], groups: list[int], batch: int, shuffle: str = "images", **how: int) -> StepSampler:
    schedule = Schedule(epochs=1, learning_rate=1, global_batch=batch, shuffle=shuffle)
    return StepSampler(np.array(lengths), np.array(groups), schedule, **{"max_row_tokens": 100, "seed": 0, **how})


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 9)), min_size=1, max_size=60),
    st.integers(1, 17),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(["images", "conversations"]),
)
def test_every_conversation_once_and_every_process_as_often(
    rows: list[tuple[int, int]], batch: int, processes: int, max_row_tokens: int, shuffle: str
) -> None:
    lengths = [length for length, _ in rows]
    names = {group: i for i, group in enumerate(dict.fromkeys(group for _, group in rows))}
    groups = [names[group] for _, group in rows]
    samplers = [
        sampler(lengths, groups, batch, shuffle, rank=rank, world_size=processes, max_row_tokens=max_row_tokens)
        for rank in range(processes)
    ]
    alone = sampler(lengths, groups, batch, shuffle, max_row_tokens=max_row_tokens)
    seen: list[int] = []
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == len(alone)
    for i, (shares, step) in enumerate(zip(steps, alone, strict=True)):
        assert len({len(share) for share in shares}) == 1, "every process runs as many device batches"
        together = sorted(row for share in shares for device_batch in share for row in device_batch)
        assert together == sorted(row for device_batch in step for row in device_batch)
        assert len(together) == batch or i == len(steps) - 1
        for device_batch in (device_batch for share in shares for device_batch in share):
            cost = len(device_batch) * max((lengths[row] for row in device_batch), default=0)
            assert cost <= max_row_tokens or len(device_batch) == 1
        seen += together
    assert sorted(seen) == list(range(len(rows)))


def test_images_are_drawn_whole() -> None:
    groups = np.repeat(np.arange(30), 4)
    order = shuffled(groups, "images", seed=3, epoch=0)
    drawn = groups[order].reshape(30, 4)
    assert (drawn == drawn[:, :1]).all()
    assert not (drawn[:, 0] == np.arange(30)).all()
    plain = groups[shuffled(groups, "conversations", seed=3, epoch=0)].reshape(30, 4)
    assert not (plain == plain[:, :1]).all()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one = sampler([5] * 40, list(range(40)), 8)
    first = list(one)
    one.set_epoch(1)
    second = list(one)
    one.set_epoch(0)
    assert first == list(one) != second
    assert list(sampler([5] * 40, list(range(40)), 8, seed=1)) != first


def test_costs_are_balanced_over_processes() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, size=128)
    shares = share_of_step(range(128), lengths, max_row_tokens=4000, world_size=4)
    costs = [sum(int(lengths[row]) for batch in share for row in batch) for share in shares]
    assert max(costs) / min(costs) < 1.05


@pytest.mark.parametrize("processes", [3, 4])
def test_more_processes_than_conversations_leaves_some_with_empty_batches(processes: int) -> None:
    shares = share_of_step([0, 1], np.array([5, 5]), max_row_tokens=100, world_size=processes)
    assert sorted(len(share[0]) for share in shares) == [0] * (processes - 2) + [1, 1]

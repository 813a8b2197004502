"""Steps: each conversation once an epoch, exactly `global_batch` of them a step, the same on any number of
processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamed_peft import Schedule
from llavamed_peft.batches.bins import ANOTHER_BATCH
from llavamed_peft.batches.shares import DeviceBatch, Prefixes, packed_share_of_step, share_of_step
from llavamed_peft.batches.steps import StepSampler, shuffled


def sampler(
    lengths: list[int], groups: list[int], batch: int, shuffle: str = "images", **how: int
) -> StepSampler:
    schedule = Schedule(epochs=1, learning_rate=1, global_batch=batch, shuffle=shuffle)
    return StepSampler(
        np.array(lengths), np.array(groups), schedule, **{"max_row_tokens": 100, "seed": 0, **how}
    )


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
        sampler(
            lengths, groups, batch, shuffle, rank=rank, world_size=processes, max_row_tokens=max_row_tokens
        )
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


def test_images_are_drawn_with_all_their_conversations() -> None:
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


def row_tokens(batch: DeviceBatch, lengths: np.ndarray, prefixes: Prefixes) -> int:
    """Tokens of a packed row: every beginning once, and the rest of each conversation."""
    begun = {(int(prefixes.keys[row]), int(prefixes.tokens[row])) for row in batch}
    return sum(tokens for _, tokens in begun) + sum(int(lengths[row] - prefixes.tokens[row]) for row in batch)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5)), min_size=1, max_size=60),
    st.lists(st.integers(0, 90), min_size=6, max_size=6),
    st.integers(1, 5),
    st.integers(1, 300),
    st.one_of(st.none(), st.integers(1, 300)),
)
def test_packed_rows_hold_every_conversation_once_and_keep_their_bound(
    rows: list[tuple[int, int]], beginnings: list[int], processes: int, max_row_tokens: int, fill: int | None
) -> None:
    keys = np.array([key for _, key in rows])
    prefixes = Prefixes(keys, np.array(beginnings)[keys])
    lengths = prefixes.tokens + [own for own, _ in rows]
    shares = packed_share_of_step(range(len(rows)), lengths, prefixes, max_row_tokens, fill, processes)
    assert len(shares) == processes and len({len(share) for share in shares}) == 1, (
        "as many device batches for each"
    )
    batches = [batch for share in shares for batch in share]
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        tokens = row_tokens(batch, lengths, prefixes)
        assert tokens <= max_row_tokens or len(batch) == 1
        lots: dict[int, list[int]] = {}  # what begins alike, and has a beginning
        for row in batch:
            lots.setdefault(int(keys[row]) if prefixes.tokens[row] else -1 - row, []).append(row)
        if fill is not None and len(lots) > 1:
            loads = [row_tokens(tuple(lot), lengths, prefixes) for lot in lots.values()]
            assert len(loads) * max(loads) <= (
                max_row_tokens if len(lots) == len(batch) else min(fill, max_row_tokens)
            )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 900))
def test_rows_of_one_length_are_batched_as_cheaply_as_can_be(lengths: list[int], max_row_tokens: int) -> None:
    prefixes = Prefixes(np.arange(len(lengths)), np.zeros(len(lengths), dtype=int))
    (share,) = packed_share_of_step(range(len(lengths)), np.array(lengths), prefixes, max_row_tokens, 1, 1)

    def takes(batch: Sequence[int]) -> int:
        return len(batch) * max(batch)

    descending = sorted(lengths, reverse=True)
    cuts = [
        [descending[begin:end] for begin, end in pairwise([0, *cut, len(lengths)])]
        for number in range(len(lengths))
        for cut in combinations(range(1, len(lengths)), number)
    ]
    allowed = [cut for cut in cuts if all(takes(batch) <= max_row_tokens or len(batch) == 1 for batch in cut)]
    least = min(sum(takes(batch) + ANOTHER_BATCH for batch in cut) for cut in allowed)
    assert sum(takes([lengths[row] for row in batch]) + ANOTHER_BATCH for batch in share) == least


def test_rows_of_their_own_are_dealt_out_evenly() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, size=128)
    prefixes = Prefixes(np.arange(128), np.zeros(128, dtype=int))
    shares = packed_share_of_step(range(128), lengths, prefixes, 4096, 1024, 4)
    costs = [
        sum(len(batch) * int(lengths[list(batch)].max()) for batch in share if batch) for share in shares
    ]
    assert max(costs) / min(costs) < 1.05


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        # The shortest row for the process that has the longest
        (
            [100, 90, 60, 50],
            [[[100], [50]], [[90], [60]]],
        ),
        ([60, 60, 50, 40, 40, 30], [[[50, 30], [60]], [[40, 40], [60]]]),
        ([70, 30, 30, 30], [[[30, 30, 30]], [[70]]]),
    ],
)
def test_rows_of_flex_attention_are_few_and_dealt_out_evenly(
    sizes: list[int], rows: list[list[list[int]]]
) -> None:
    prefixes = Prefixes(np.arange(len(sizes)), np.zeros(len(sizes), dtype=int))
    shares = packed_share_of_step(range(len(sizes)), np.array(sizes), prefixes, 100, None, 2)
    assert [[[sizes[conversation] for conversation in row] for row in share] for share in shares] == rows


def test_many_long_conversations_are_planned_in_as_few_rows_as_hold_them() -> None:
    """Each needs a row of its own, which is far from what the sum of their lengths says."""
    lengths = np.random.default_rng(0).integers(4100, 4300, size=2048)
    prefixes = Prefixes(np.arange(2048), np.zeros(2048, dtype=int))
    shares = packed_share_of_step(range(2048), lengths, prefixes, 8192, None, 8)
    assert [len(share) for share in shares] == [256] * 8 and all(
        len(batch) == 1 for share in shares for batch in share
    )


def test_a_packed_step_has_the_same_conversations_on_any_number_of_processes() -> None:
    lengths, groups = np.array([50, 60] * 20), np.arange(40) // 4
    prefixes = Prefixes(groups, np.full(40, 30))
    alone = sampler(lengths.tolist(), groups.tolist(), 16, prefixes=prefixes)
    several = [
        sampler(lengths.tolist(), groups.tolist(), 16, rank=r, world_size=3, prefixes=prefixes)
        for r in range(3)
    ]
    for step, *shares in zip(alone, *several, strict=True):
        assert sorted(row for batch in step for row in batch) == sorted(
            row for s in shares for batch in s for row in batch
        )


PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "vqa_rad" / "trainset.json"


@pytest.mark.skipif(
    not PUBLISHED.is_file(),
    reason="the published VQA-RAD files are not beside the repository (../shared/data)",
)
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("max_row_tokens", [2048, 4096, 16384])
@pytest.mark.parametrize("global_batch", [64, 128])
def test_real_questions_fill_packed_rows_well(processes: int, max_row_tokens: int, global_batch: int) -> None:
    """VQA-RAD as LLaVA-1.5 sees it: 580 tokens of image and prompt, about a token for four characters of a
    question."""
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    names = {name: number for number, name in enumerate(dict.fromkeys(row["image_name"] for row in rows))}
    groups = np.array([names[row["image_name"]] for row in rows])
    lengths = 580 + np.array([10 + len(f"{row['question']} {row['answer']}") // 4 for row in rows])
    prefixes = Prefixes(groups, np.full(len(rows), 580))
    how = {"max_row_tokens": max_row_tokens, "world_size": processes, "prefixes": prefixes}
    steps = sampler(lengths.tolist(), groups.tolist(), global_batch, **how)
    useful = laid = longest = padded = 0
    for step in steps.steps():
        useful += row_tokens(tuple(step), lengths, prefixes)
        padded += len(step) * int(lengths[step].max())
        loads = [[row_tokens(batch, lengths, prefixes) for batch in share] for share in steps.shares(step)]
        # An empty row has two tokens of padding
        laid += sum(max(load, 2) for share in loads for load in share)
        longest += processes * max(map(sum, loads))
    assert useful / laid > 0.97
    assert useful / longest > 0.85, "no process waits long for another"
    assert padded / laid > 6

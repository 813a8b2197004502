"""Items of different sizes into bins: of similar size, or evenly."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

# Tokens whose work costs a small model about as much as one more device batch (benchmarks/LOG.md).
ANOTHER_BATCH = 128


def alike(items: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items of similar size into bins, each taking as much as its bin's largest: as little in all as
    possible.

    Args:
        items: which of the sizes.
        sizes: of the items.
        capacity: of a bin; an item that is larger has its own.
    """
    ordered = sorted(items, key=lambda item: -sizes[item])
    # Dynamic programming over the items in order: the least cost of the first `end` items, and the item with
    # which the last of their bins begins.
    costs, begins = [0], [0]
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
    while end:  # backwards, from the last bin
        bins.append(ordered[begins[end] : end])
        end = begins[end]
    return bins[::-1]


def even(sizes: Sequence[int], capacity: int, multiple: int) -> tuple[list[list[int]], list[int]]:
    """Items into about as few bins as hold them, a multiple of some number, all about equally full; one too
    large has its own.

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
    number = (
        bisect.bisect_left(range(most), True, lo=min(least, most) - 1, key=lambda bins: hold(bins + 1)) + 1
    )
    return fill(min(number, most) * multiple)

"""The works that are measured, and the arms that do them."""

from __future__ import annotations

from typing import Any, NamedTuple

from packing_data import CURVE

SAME_LOSS = 1e-4  # relative: the sides sum the same losses in another order


class Arm(NamedTuple):
    """One way to train.

    Args:
        label: in the table.
        side: which function runs it.
        how: its settings; TRL's device batch and workers are found by probing.
    """

    label: str
    side: str
    how: dict[str, Any]


class Work(NamedTuple):
    """One kind of data, and what is wanted of packing on it.

    Args:
        data: whose rows of `packing_data.py`; several works may share them.
        conversations: of an optimizer step, where the command does not say.
        steps: of a packed run.
        ours: the arm that is judged.
        least: against "trl" and "trl defaults", how many times as fast it is to be.
        memory: share of TRL's peak memory that it may take; `None`: not judged.
        explained_by: arms that run in the first pair alone.
    """

    data: str
    conversations: int
    steps: int
    ours: str
    least: dict[str, float]
    memory: float | None = None
    explained_by: tuple[str, ...] = ()


ARMS = {
    "packed": Arm("packed", "ours", {"feature_cache": False}),
    "cached": Arm("packed, features cached", "ours", {"feature_cache": True}),
    "padded": Arm("ours, padded", "ours", {"layout": "padded", "feature_cache": False}),
    "trl": Arm("TRL, best settings", "trl", {"form": "best"}),
    "defaults": Arm("TRL, defaults", "trl", {"form": "defaults", "device_batch": 8, "workers": 0}),
    "dialogue": Arm("TRL, an image's questions as one dialogue", "trl", {"form": "dialogue"}),
}

WORKS = {
    "vqa": Work("vqa", 64, 4, "packed", {"trl": 8.0}, 1 / 3, ("padded", "dialogue")),
    "vqa-cached": Work("vqa", 64, 4, "cached", {"trl": 10.0}),
    "slake": Work("slake", 64, 4, "packed", {"trl": 8.0}),
    "instruct": Work("instruct", 32, 2, "packed", {"trl": 1.15, "defaults": 1.3}, explained_by=("padded",)),
    "align": Work("align", 32, 2, "packed", {"trl": 1.0, "defaults": 1.25}, explained_by=("padded",)),
    **{f"curve-{number}": Work(f"curve-{number}", 40, 2, "packed", {}) for number in CURVE},
}

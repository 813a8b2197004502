"""What was measured of the data path, summed up for the log."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from data_path_data import GLOBAL_BATCH
from workbench import heading, machine

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "pillow")
WANTED_SHARE, WANTED_START, WANTED_GROWTH = (0.95, 20.0, 16.0)  # of a worker's time on images; seconds; MB
Memory = dict[str, float]


# The result


def summarise(
    options: argparse.Namespace, parts: dict[str, dict[str, Any]], index_mb: float
) -> dict[str, Any]:

    return {
        **heading("data_path", LIBRARIES),
        "machine": machine() + (", shared with other work" if options.shared else ""),
        "settings": {name: getattr(options, name) for name in ("rows", "epochs", "real_rows", "workers")},
        "index_mb": index_mb,
        "growth_mb": growth(parts["epochs"]["memory"]),
        **parts,
    }


def growth(looks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Anonymous memory of all processes together, MB: the most in the first epoch, and how much it grew.

    Within: the most in the last fifth of the first epoch against its second fifth. Later: the most in later
        epochs against that.
    """
    totals = [
        [
            look["parent"]["anonymous"] + sum(worker["anonymous"] for worker in look["workers"])
            for look in epoch
        ]
        for epoch in looks
    ]
    first, later = totals[0], [total for epoch in totals[1:] for total in epoch]
    fifth = max(len(first) // 5, 1)
    if not first:
        return {}
    within = max(first[-fifth:]) - max(first[fifth : 2 * fifth] or first)
    return {"first": max(first), "within": within, "later": max(later, default=max(first)) - max(first)}


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    settings, built, started, grown = (
        result["settings"],
        result["build"],
        result["start"],
        result["growth_mb"],
    )
    rows = []
    for part in ("epochs", "packed", "padded"):
        for number, epoch in enumerate(result[part]["epochs"], 1):
            name = (
                f"16×16 to 28×28, packed, epoch {number}"
                if part == "epochs"
                else f"640×480 to 336×336, {part}"
            )
            rows.append(
                f"| {name} | {result[part]['rows']:,} | {epoch['rows_per_worker_second']:,.0f} | "
                f"{epoch['on_images_us_per_row']:,.0f} | {epoch['other_us_per_row']:,.0f} | "
                f"{epoch['share_on_images']:.1%} | {epoch['seconds']:,.0f} |"
            )
    shares = [result[part]["epochs"][0]["share_on_images"] for part in ("packed", "padded")]
    fits = {
        "share": min(shares) >= WANTED_SHARE,
        "start": started["seconds"] <= WANTED_START,
        "memory": max(grown.get("within", 0), grown.get("later", 0)) <= WANTED_GROWTH,
    }
    missed = [name for name, fine in fits.items() if not fine]
    memory = "no look at the memory was taken"
    if grown:
        memory = (
            f"anonymous memory of all processes at most {grown['first']:,.0f} MB in the first epoch, growing "
            f"by {grown['within']:+.1f} MB within it and {grown['later']:+.1f} MB in later ones"
        )
    return "\n".join(
        [
            f"## {result['date']} · data_path: rows checked, found again, decoded",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: {settings['rows']:,} rows about an image of their own, {built['mean_tokens']:.0f} "
            f"tokens in the mean, {settings['workers']} workers, steps of {GLOBAL_BATCH}, no model; CPU "
            "seconds of the workers",
            f"- Expected: with images of 640×480 at least {WANTED_SHARE:.0%} of a worker's time on images; "
            f"first step within {WANTED_START:.0f} s of starting a process; memory growing by at most "
            f"{WANTED_GROWTH:.0f} MB",
            f"- Result: {'as expected' if not missed else 'not as expected: ' + ', '.join(missed)}. On "
            f"images **{shares[0]:.1%}** packed, **{shares[1]:.1%}** padded; first step after "
            f"**{started['seconds']:.1f} s** (imports {started['imports']:.1f}, hashing and finding the "
            f"index {started['index']:.1f}; {started['cpu_seconds']:.1f} of CPU in all); {memory}",
            f"- Building the index: {built['seconds']:,.0f} s, {built['cpu_seconds']:,.0f} of them CPU, "
            f"{settings['rows'] / built['cpu_seconds']:,.0f} rows/s by CPU time, at most "
            f"{built['peak_mb']:,.0f} MB; the file has {result['index_mb']:,.0f} MB",
            "",
            "| images | rows | rows/s per worker | on images, µs a row | else, µs a row | share on images | "
            "wall, s |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )

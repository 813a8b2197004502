"""What was measured of packed training, summed up: the curve and the log's entry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packing_bench import Bench
from packing_data import CURVE
from packing_runs import RANK, Run
from packing_works import ARMS, WORKS
from workbench import (
    heading,
    spread,
)

WANTED_USEFUL = 0.97


def summarise(
    options: argparse.Namespace, works: Sequence[str], parameters: int, bench: Bench
) -> dict[str, Any]:
    """Medians and ranges of every arm, and of the pairs' ratios."""
    found: dict[str, Any] = {}
    for name in works:
        work = WORKS[name]
        # vqa and vqa-cached share their data's runs
        its_own = {
            work.ours,
            "trl",
            *work.least,
            *work.explained_by,
        }
        arms = {arm: runs for arm in ARMS if arm in its_own and (runs := bench.of(name, arm))}
        ours = arms[work.ours]
        ratios = {
            arm: spread(
                [one["per_second"] / other["per_second"] for one, other in zip(ours, runs, strict=False)]
            )
            for arm, runs in arms.items()
        }
        memory = [
            one["peak_mb"] / other["peak_mb"] for one, other in zip(ours, arms.get("trl", ours), strict=True)
        ]
        useful = [run["counts"]["useful"] for run in ours]
        missed = [f"{arm} {least:g}×" for arm, least in work.least.items() if ratios[arm]["median"] < least]
        missed += ["memory"] if work.memory is not None and spread(memory)["median"] > work.memory else []
        missed += ["useful positions"] if min(useful) < WANTED_USEFUL else []
        found[name] = {
            "wanted": {**work.least, "memory": work.memory, "useful": WANTED_USEFUL},
            "missed": missed,
            "ratio": ratios,
            "memory_ratio": spread(memory),
            "useful": spread(useful),
            "bound": spread([run["counts"]["bound"] for run in ours]),
            "bound_packing": spread([run["counts"]["bound_packing"] for run in ours]),
            "arms": {arm: _spreads(runs) for arm, runs in arms.items()},
            "runs": arms,
        }
    return {
        **heading("packing"),
        "shared": options.shared,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("data", "log", "shared")
        },
        "real_data": options.data is not None,
        "parameters": parameters,
        "probed": bench.probed,
        "works": found,
        "curve": _curve(found),
    }


def _spreads(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    told = (
        "per_second",
        "per_cpu_second",
        "peak_mb",
        *(["waiting_share"] if "waiting_share" in runs[0] else []),
    )
    return {what: spread([run[what] for run in runs]) for what in told}


def _curve(found: dict[str, Any]) -> list[dict[str, float]]:
    """For each number of questions an image: ratio to TRL, and both bounds."""
    if f"curve-{CURVE[0]}" not in found:
        return []
    points = []
    for number in CURVE:
        work = found[f"curve-{number}"]
        ratio = work["ratio"]["trl"]
        bounds = {name: work[name]["median"] for name in ("bound", "bound_packing")}
        points.append(
            {"questions": number, "ratio": ratio, **bounds, "near": ratio["median"] / bounds["bound"]}
        )
    return points


def draw_curve(curve: Sequence[dict[str, Any]], path: Path) -> None:
    """The curve beside its bounds, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [point["questions"] for point in curve]
    medians = [point["ratio"]["median"] for point in curve]
    reach = [
        [abs(point["ratio"][end] - point["ratio"]["median"]) for point in curve] for end in ("least", "most")
    ]
    axes.errorbar(numbers, medians, yerr=reach, marker="o", capsize=3, label="measured")
    axes.plot(
        numbers, [point["bound"] for point in curve], "--", label="by FLOPs, TRL's head as it is on a CPU"
    )
    axes.plot(numbers, [point["bound_packing"] for point in curve], ":", label="by FLOPs, packing alone")
    axes.set_xlabel("questions an image")
    axes.set_ylabel("times TRL's questions per second")
    axes.set_xticks(numbers)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    settings, works = result["settings"], result["works"]
    tokens = (settings["image_size"] // 14) ** 2
    missed = "; ".join(
        f"{name} ({', '.join(work['missed'])})" for name, work in works.items() if work["missed"]
    )
    rows = [
        _table_row(name, arm, work)
        for name, work in works.items()
        for arm in work["arms"]
        if not name.startswith("curve")
    ]
    probes = [
        f"{kind}: device batch {best['device_batch']}, {best['workers']} worker(s)"
        for kind, tried in result["probed"].items()
        for best in [max(tried, key=lambda found: found["per_second"])]
    ]
    lines = [
        f"## {result['date']} · packing: packed training beside TRL at its best",
        "",
        f"- Machine: {result['machine']}{', shared with other work' if result['shared'] else ''}",
        f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
        f"- Command: `{result['command']}`",
        f"- What: LLaVA of {result['parameters'] / 1e6:.1f} M parameters, {tokens} image tokens, vocabulary "
        f"{settings['vocabulary']:,}, LoRA rank {RANK} and projector, fp32; "
        f"{'real' if result['real_data'] else 'made-up'} questions; {settings['pairs']} pairs. TRL's best: "
        f"{'; '.join(probes)}",
        "- Expected: "
        f"{'; '.join([_wanted(name) for name in works if WORKS[name].least] or ['near the bound'])}; "
        f"{WANTED_USEFUL:.0%} of the positions useful",
        f"- Result: {f'missed: {missed}' if missed else 'as expected'}",
        "",
    ]
    if rows:
        speed = "questions/s, median (range) | per CPU second | waiting"
        head = f"work | trained by | {speed} | peak MB | packed is, times | by FLOPs | useful"
        lines += [f"| {head} |", "|" + "---|" * 9, *rows, ""]
    if result["curve"]:
        lines += [
            "| questions an image | times TRL's speed (range) | bound by FLOPs | of packing alone | of the "
            "bound |",
            "|---|---|---|---|---|",
            *(
                f"| {point['questions']} | {_times(point['ratio'])} | {point['bound']:.1f} | "
                f"{point['bound_packing']:.1f} | {point['near']:.0%} |"
                for point in result["curve"]
            ),
            "",
        ]
    return "\n".join(lines)


def _table_row(name: str, arm: str, work: dict[str, Any]) -> str:
    found = work["arms"][arm]
    judged = arm == WORKS[name].ours
    ratio = "" if judged else _times(work["ratio"][arm])
    waiting = format(found["waiting_share"]["median"], ".1%") if "waiting_share" in found else ""
    bound = {"trl": work["bound"], "padded": work["bound_packing"]}.get(arm)
    return (
        f"| {name} | {ARMS[arm].label} | {_range(found['per_second'], 2)} | "
        f"{found['per_cpu_second']['median']:.2f} | {waiting} | {_range(found['peak_mb'], 0)} | {ratio} | "
        f"{'' if bound is None else format(bound['median'], '.1f')} | "
        f"{format(work['useful']['median'], '.1%') if judged else ''} |"
    )


def _wanted(name: str) -> str:
    """What is wanted of a work, such as `vqa 8× trl at .33 of its memory`."""
    work = WORKS[name]
    memory = f" at {work.memory:.2f} of its memory".replace("0.", ".") if work.memory is not None else ""
    return f"{name} {', '.join(f'{least:g}× {arm}' for arm, least in work.least.items())}{memory}"


def _range(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:,.{digits}f} ({value['least']:,.{digits}f} to {value['most']:,.{digits}f})"


def _times(value: dict[str, float]) -> str:
    return f"**{value['median']:.2f}** ({value['least']:.2f} to {value['most']:.2f})"

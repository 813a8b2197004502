"""What a finished run has to show: loss curves, and a table of its stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from ..adapters.record import StageRecord
from ..reporting.run_log import METRICS

CURVE, TABLE = "loss.png", "stages.md"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in the order in which they came."""
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def draw_losses(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss of each step and the held-out losses of all stages, one panel a stage, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = dict.fromkeys(record["stage"] for record in history)
    figure = Figure(figsize=(4 * len(stages), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    plot_losses(figure.subplots(1, len(stages), squeeze=False)[0], history)
    figure.savefig(path, dpi=120)


def plot_losses(panels: Sequence[Axes], history: Sequence[dict[str, Any]]) -> None:
    """The same on panels of a given figure, one for each stage."""
    stages = dict.fromkeys(record["stage"] for record in history)
    for panel, stage in zip(panels, stages, strict=True):
        for key, style, label in (("loss", "-", "training"), ("eval_loss", "o", "held out")):
            points = [
                (record["step"], record[key])
                for record in history
                if record["stage"] == stage and key in record
            ]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
        panel.set(
            title=stage.replace("$", r"\$"), xlabel="optimizer step", ylabel="loss per supervised token"
        )
        panel.set_ylim(bottom=0)
        panel.legend()


def stage_table(records: Sequence[StageRecord]) -> str:
    """The stages' numbers, from their `stage.json`, as a Markdown table."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    rows = [
        "| stage | trains | parameters | used | rejected | failed | steps | loss first → last "
        "| held out, before → after | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        metrics, data, stage = record.metrics, record.data, record.stage
        rows.append(
            f"| {stage.name} | {stage.trains} | {metrics['trainable_parameters']:,} | "
            f"{sum(entry.used for entry in data)} | {sum(sum(entry.rejected.values()) for entry in data)} | "
            f"{sum(entry.failed for entry in data)} | {metrics['steps']} | {number(metrics['loss_first'])} → "
            f"{number(metrics['loss_last'])} | {number(metrics['eval_loss_before'])} → "
            f"{number(metrics['eval_loss_after'])} | {metrics['seconds']:.1f} |"
        )
    return "\n".join(rows) + "\n"

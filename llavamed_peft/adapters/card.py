"""The Hub card of a stage: what it is, how it was made, how to load it with stock PEFT alone."""

from __future__ import annotations

from typing import Any

import yaml

from .record import StageRecord

_NOTICE = """\
For research only; not for clinical use. The adapter inherits the licence and the terms of its base model \
and of the data it was
trained on. LLaVA-Med's own data are CC BY-NC 4.0.
"""

_LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}")  # path or Hub id of this folder
processor = AutoProcessor.from_pretrained("{folder}")
```
"""

_LOAD_CHECKPOINT = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```
"""


def _origin(record: StageRecord) -> str:
    root = record.root
    if root is None or root == record.base:
        return ""
    return f" It was trained from `{root.public_name}` (content hash `{root.sha256}`)."


def card_text(record: StageRecord, base_name: str) -> str:
    """The card of a stage's folder, as Markdown with the Hub's metadata in front.

    Args:
        record: of the stage.
        base_name: Hub id or plain name of the base; never a path.
    """
    stage, base, metrics, computing = record.stage, record.base, record.metrics, record.computing
    is_adapter = record.kind == "adapter"
    metadata: dict[str, Any] = {
        # the Hub takes ids of its own and nothing else
        **(
            {"base_model": base.id, "base_model_relation": "adapter" if is_adapter else "finetune"}
            if base.id
            else {}
        ),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "license_name": "inherits-base-model-and-data",
        "tags": [
            "llavamed-peft",
            "llava-med",
            "medical",
            f"stage:{stage.name}",
            f"trains:{stage.trains}",
        ],
        "metrics": ["loss"],
    }
    losses = {
        name: metrics[name]
        for name in ("eval_loss_before", "eval_loss_after", "loss_last")
        if metrics.get(name) is not None
    }
    identity = f"revision `{base.revision}`" if base.id else f"content hash `{base.sha256}`"
    parent = record.parent
    origin = f"stage `{parent.stage}` (`{parent.sha256[:12]}…`)" if parent else "the base itself"
    folder = stage.name
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {base_name}, stage {stage.name}",
        "",
        f"One stage of the LLaVA-Med curriculum (arXiv:2306.00890), trained with `llavamed-peft` "
        f"{record.versions['llavamed-peft']}: `trains={stage.trains}`, continuing {origin}.",
        "",
        f"Base: `{base_name}`, {identity}." + _origin(record),
        "",
        "Trained over "
        f"{'4-bit weights (NF4)' if computing['quantization'] else 'weights that were not quantized'}, "
        f"computed in {computing['dtype']}.",
        "",
        "## Load it",
        "",
        (_LOAD_ADAPTER if is_adapter else _LOAD_CHECKPOINT).format(base=base_name, folder=folder),
        "The processor carries the chat template and the image padding it was trained with.",
        "",
        "## Data",
        "",
        "| file | sha256 | rows | used | rejected | failed |",
        "|---|---|---|---|---|---|",
        *(
            f"| {entry.file} | `{entry.sha256[:12]}…` | {entry.rows} | {entry.used} | "
            f"{sum(entry.rejected.values())} | {entry.failed} |"
            for entry in record.data
        ),
        "",
        "## Numbers",
        "",
        *(f"- {name}: {value:.4f}" for name, value in losses.items()),
        f"- {metrics['steps']} steps, {metrics['conversations']} conversations, "
        f"{metrics['supervised_tokens']} supervised tokens, {metrics['seconds']} s on {record.device}",
        "",
        "Losses are means over supervised tokens. `stage.json` holds the schedule, versions and lineage.",
        "",
        "## Licence and use",
        "",
        _NOTICE,
    ]
    return "\n".join(lines)

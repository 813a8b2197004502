"""The Hub card of a stage: what it is, how it was made, how to load it with stock PEFT alone."""

from __future__ import annotations

from typing import Any

import yaml

from ..modeling.quantization import NOT_QUANTIZED
from .record import StageRecord

_NOTICE = """\
For research only; not for clinical use. The adapter inherits the licence and the terms of its base model \
and of the data it was trained on. LLaVA-Med's own data are CC BY-NC 4.0.
"""

_LOAD_ADAPTER = """\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, "{folder}")  # path or Hub id of this folder
processor = AutoProcessor.from_pretrained("{folder}")
```
"""

# The 4-bit weights are made of the stored ones; the rest is rounded afterwards, as in training.
_LOAD_OVER_NF4 = """\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{dtype}, llm_int8_skip_modules={kept},
)
base = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto", quantization_config=nf4)
for parameter in base.parameters():  # all but the 4-bit weights
    if parameter.is_floating_point():
        parameter.data = parameter.data.to(torch.{dtype})
model = PeftModel.from_pretrained(base, "{folder}")  # path or Hub id of this folder
processor = AutoProcessor.from_pretrained("{folder}")
```
"""

_LOAD_CHECKPOINT = """\
```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}", dtype=torch.{dtype})
processor = AutoProcessor.from_pretrained("{folder}")
```
"""


def _how_to_load(record: StageRecord, base_name: str) -> list[str]:
    """How stock libraries give the trained model, and where it stops."""
    computing = record.computing
    if record.kind != "adapter":
        code = _LOAD_CHECKPOINT
    elif computing.get("quantization") == "nf4":
        code = _LOAD_OVER_NF4
    else:
        code = _LOAD_ADAPTER
    words = {"base": base_name, "folder": record.stage.name, "dtype": computing["dtype"]}
    lines = [code.format(**words, kept=list(NOT_QUANTIZED))]
    if computing["dtype"] == "bfloat16":
        lines += [
            "It was trained under autocast. Inside `torch.autocast(model.device.type, torch.bfloat16)` the "
            "model computes what it computed then; without it, a few of its most likely tokens may differ.",
            "",
        ]
    lines += ["The processor carries the chat template and the image padding it was trained with.", ""]
    if record.stop_tokens:
        stops = " and ".join(f"`{token}` (id {number})" for token, number in record.stop_tokens.items())
        known = (
            "The generation config in this folder stops there."
            if record.kind != "adapter"
            else f"Where the base's generation config does not hold it, pass `eos_token_id="
            f"{list(record.stop_tokens.values())}` to `generate`, or it does not stop."
        )
        lines += [f"An answer ends in {stops}. {known}", ""]
    return lines


def _origin(record: StageRecord) -> str:
    root = record.root
    if root is None or root == record.base:
        return ""
    return f" It was trained from `{root.public_name}` (content hash `{root.sha256}`)."


def _merged_words(record: StageRecord) -> list[str]:
    if record.merged is None:
        return []
    merged = {
        "dequantised": "merged onto what the base's 4-bit weights stand for",
        "original": "merged onto the base's weights",
        None: "unchanged but for rounding",
    }[record.merged.onto]
    return [
        f"This is that stage, {merged}, written in {record.merged.dtype}. Steps, times and the "
        "last training loss are the stage's; a held-out loss, if there is one, is of the weights in this "
        "folder.",
        "",
    ]


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
        for name in ("eval_loss_before", "eval_loss_after", "eval_loss_unrounded", "loss_last")
        if metrics.get(name) is not None
    }
    identity = f"revision `{base.revision}`" if base.id else f"content hash `{base.sha256}`"
    parent = record.parent
    origin = f"stage `{parent.stage}` (`{parent.sha256[:12]}…`)" if parent else "the base itself"
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
        *_merged_words(record),
        "## Load it",
        "",
        *_how_to_load(record, base_name),
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

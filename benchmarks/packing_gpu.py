"""Packed rows on one CUDA GPU, beside padded ones and TRL's trainer, with a LLaVA of LLaVA-1.5-7B's shape.

    python benchmarks/packing_gpu.py --work vqa --data DATA --log      # every arm, five repeats: hours
    python benchmarks/packing_gpu.py --work vqa --data DATA --log --folder B --minutes 9     # what can be had in ten minutes
    python benchmarks/packing_gpu.py --tiny --quantization none --row_tokens 2048            # a miniature, also without a GPU

Weights are random (13.5 GB in bf16, drawn on the GPU; `--folder` keeps them for the next command). Each run is a process of its
own (`packing_runs.py`), one LoRA stage on the questions of `packing_data.py` with activation checkpointing, the first optimizer
step left out since it compiles. The arms:

- packed: rows read by FlexAttention, as `curriculum_finetune` has them on CUDA. A bound of tokens holds for a row.
- packed, sdpa: what it falls back to: masks in full where something is shared, rows of their own where nothing is.
- padded: `layout="padded"`, with the same bound for rows × longest; `sdpa` chooses the kernel.
- TRL: its `SFTTrainer` over the same base, LoRA and data, length-grouped, the answers' loss alone; its best device batch counts.

Arms of one base take turns, repeat by repeat, and a ratio is of runs of one repeat. What runs out of memory is written down so.

Not yet run on a GPU. Left out: several GPUs, FlashAttention's own package, Liger's kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packing_data import Drawer
from packing_runs import RUNS, SEED
from workbench import (
    SPECIAL,
    heading,
    llava_config,
    make_processor,
    run_apart,
    save_stage_processor,
    spread,
    train_tokenizer,
    write_checkpoint,
    write_down,
)

KINDS = ("packed", "packed, sdpa", "padded", "TRL")
SAME_LOSS = 0.02  # relative; bf16 rounds the sides' sums otherwise
TEXT_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TOWER_7B = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}


class Arm(NamedTuple):
    """One way to train.

    Args:
        base: "bf16" or "nf4".
        kind: one of `KINDS`.
        size: tokens of a device batch, or TRL's conversations.
    """

    base: str
    kind: str
    size: int

    def asked(self) -> dict[str, Any]:
        """Which side of `packing_runs.py` runs it, and how."""
        quantization = None if self.base == "bf16" else self.base
        if self.kind == "TRL":
            how = {"form": "best", "device_batch": self.size, "workers": 4, "quantization": quantization}
            return {"side": "trl", "how": how}
        how = {"max_row_tokens": self.size, "quantization": quantization, "feature_cache": False, "gradient_checkpointing": True}
        how |= {"layout": "padded"} if self.kind == "padded" else {"attention": "sdpa"} if self.kind == "packed, sdpa" else {}
        return {"side": "ours", "how": how}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=["vqa", "slake", "instruct", "align"], default="vqa", help="what to train on")
    parser.add_argument("--data", type=Path, help="folder of vqa_rad/ and slake/; left out: both are made up")
    parser.add_argument("--arms", nargs="+", choices=KINDS, default=KINDS, help="what to run")
    parser.add_argument("--row_tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="bounds of a device batch")
    parser.add_argument("--device_batches", type=int, nargs="+", default=[4, 8, 16], help="of TRL's, to choose from")
    parser.add_argument("--quantization", nargs="+", choices=["none", "nf4"], default=["none", "nf4"], help="of the base")
    parser.add_argument("--conversations", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, the first left out")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each arm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run behind so many")
    parser.add_argument("--folder", type=Path, help="of the random weights, written if they are not there; left out: temporary")
    parser.add_argument("--tiny", action="store_true", help="a miniature of the model with 16 image tokens")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    began = time.monotonic()
    done: dict[Arm, list[dict[str, Any] | None]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        image_size = 56 if options.tiny else 336
        drawer = Drawer(folder, options.data, image_size * 4 // 3, SEED)
        parameters = build_base(folder, drawer.texts, image_size, options.tiny)
        for repeat in range(options.repeats):
            for arm in arms(options):
                if time.monotonic() - began < options.minutes * 60:
                    done.setdefault(arm, []).append(run(options, folder, drawer, repeat, arm))
    check_same_work(done)
    runs = [{**arm._asdict(), "repeats": found} for arm, found in done.items()]
    settings = vars(options) | {"data": None, "folder": None}
    result = {**heading("packing_gpu"), "parameters": parameters, "settings": settings, "runs": runs}
    entry = log_entry(result, done)
    print(entry)
    if options.log:
        write_down(result, entry, options.work)


def arms(options: argparse.Namespace) -> list[Arm]:
    """Every arm that is asked for, base by base."""
    bases = ["bf16" if name == "none" else name for name in options.quantization]
    sizes = {kind: options.device_batches if kind == "TRL" else options.row_tokens for kind in options.arms}
    return [Arm(base, kind, size) for base in bases for kind in sizes for size in sizes[kind]]


def build_base(folder: Path, texts: Sequence[str], image_size: int, tiny: bool) -> int:
    """Write `base/` in bf16, drawn on the GPU where there is one, and `processor/`, last; returns the number of parameters."""
    import torch
    from transformers import AutoModelForImageTextToText, LlamaConfig

    text = LlamaConfig(**(TEXT_TINY if tiny else TEXT_7B), vocab_size=32064, max_position_embeddings=4096)
    config = llava_config(text, image_size, SPECIAL.index("<image>"), None if tiny else TOWER_7B)
    if not (folder / "processor").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = make_processor(train_tokenizer(texts, 4096), image_size)
        write_checkpoint(folder / "base", config, processor, SEED, "bfloat16", device)
        save_stage_processor(folder)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).num_parameters()


def run(options: argparse.Namespace, folder: Path, drawer: Drawer, step: int, arm: Arm) -> dict[str, Any] | None:
    """One run, on another step of the data in every repeat; `None`: the GPU's memory did not suffice."""
    path, images = drawer.write(options.work, step, options.conversations)
    asked = {**arm.asked(), "steps": options.steps, "conversations": options.conversations}
    places = {"folder": str(folder), "file": str(path), "images": str(images)}
    found = run_apart(str(RUNS), [json.dumps(asked | places)], allowed="OutOfMemoryError")
    what = "out of memory"
    if found is not None:
        what = f"{found['per_second']:.2f} conversations/s, {found['peak_gpu_mb']:,.0f} MB of GPU memory"
    print(f"repeat {step + 1}, {arm.base}, {arm.kind}, {arm.size:,}: {what}", file=sys.stderr)
    return found


def check_same_work(done: dict[Arm, list[dict[str, Any] | None]]) -> None:
    """Every arm of a base trains as many parameters, and begins a repeat with the same loss."""
    first: dict[tuple[str, int], tuple[Arm, dict[str, Any]]] = {}
    for arm, runs in done.items():
        for repeat, found in enumerate(runs):
            if found is None:
                continue
            other, wanted = first.setdefault((arm.base, repeat), (arm, found))
            loss = abs(found["loss_first"] / wanted["loss_first"] - 1)
            if found["trainable_parameters"] != wanted["trainable_parameters"] or loss > SAME_LOSS:
                figures = [[one[key] for key in ("trainable_parameters", "loss_first")] for one in (found, wanted)]
                sys.exit(f"{arm} and {other} do not do the same work: parameters and first loss are {figures}.")


def log_entry(result: dict[str, Any], done: dict[Arm, list[dict[str, Any] | None]]) -> str:
    """The result as a section of `LOG.md`: medians, ranges, and ratios to TRL's best device batch of the same base."""
    rows = []
    for arm, runs in done.items():
        name = f"| {arm.base} | {arm.kind} | {arm.size:,}{' conversations' if arm.kind == 'TRL' else ''} "
        held = [found for found in runs if found is not None]
        if not held:
            rows.append(f"{name}| out of memory | – | – | – |")
            continue
        times = "–"
        trl = [other for other in done if (other.base, other.kind) == (arm.base, "TRL") and None not in done[other]]
        if trl and None not in runs:
            best = max(trl, key=lambda other: statistics.median(found["per_second"] for found in done[other]))
            ratio = spread([one["per_second"] / other["per_second"] for one, other in zip(runs, done[best], strict=False)])
            times = f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})"
        speed = statistics.median(found["per_second"] for found in held)
        memory = max(found["peak_gpu_mb"] for found in held)
        useful = f"{min(found['counts']['useful'] for found in held):.1%}" if "counts" in held[0] else "–"
        rows.append(f"{name}| {speed:.2f} ({len(held)} of {len(runs)}) | {times} | {memory:,.0f} | {useful} |")
    settings = result["settings"]
    return "\n".join(
        [
            f"## {result['date']} · packing_gpu: packed rows beside padded ones and TRL's",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: LLaVA of {result['parameters'] / 1e6:,.1f} M parameters, {settings['work']}, LoRA and projector; "
            f"{settings['steps']} steps of {settings['conversations']}; at most {settings['repeats']} repeats",
            "",
            "| base | arm | tokens of a device batch | conversations/s (runs) | times TRL's best (range) | GPU MB | useful |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()

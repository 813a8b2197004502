"""Packed rows under FlexAttention beside padded ones under `sdpa`, on one CUDA GPU, with a LLaVA of LLaVA-1.5-7B's shape.

    python benchmarks/packing_gpu.py --data DATA --log                 # bf16 and NF4, rows of 2,048 to 16,384 tokens; an hour
    python benchmarks/packing_gpu.py --tiny --quantization none --row_tokens 2048   # a miniature, also without a GPU

Weights are random (13.5 GB in bf16 are written to a temporary folder once). Each run is `curriculum_finetune` as a user calls it,
in a process of its own (`packing_runs.py`): one LoRA stage on the questions of `packing_data.py`, activation checkpointing on,
the first optimizer step left out since it compiles. A bound of tokens holds for a row, packed, and for rows × longest, padded.

Not yet run on a GPU. Left out: TRL's own trainer (`packing.py` has it on a CPU), several GPUs, FlashAttention's own package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

LAYOUTS = ("packed", "padded")
TEXT_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TOWER_7B = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=["vqa", "slake", "instruct", "align"], default="vqa", help="what to train on")
    parser.add_argument("--data", type=Path, help="folder of vqa_rad/ and slake/; left out: both are made up")
    parser.add_argument("--row_tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="bounds of a device batch")
    parser.add_argument("--quantization", nargs="+", choices=["none", "nf4"], default=["none", "nf4"], help="of the base")
    parser.add_argument("--conversations", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, the first left out")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each arm")
    parser.add_argument("--tiny", action="store_true", help="a miniature of the model with 16 image tokens")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        image_size = 56 if options.tiny else 336
        drawer = Drawer(Path(folder), options.data, image_size * 4 // 3, SEED)
        parameters = build_base(Path(folder), drawer.texts, image_size, options.tiny)
        runs = [
            run(options, Path(folder), drawer, repeat, {"layout": layout, "max_row_tokens": tokens, "quantization": bits})
            for repeat in range(options.repeats)
            for bits in (None if name == "none" else name for name in options.quantization)
            for tokens in options.row_tokens
            for layout in LAYOUTS
        ]
    result = {**heading("packing_gpu"), "parameters": parameters, "settings": vars(options) | {"data": None}, "runs": runs}
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, options.work)


def build_base(folder: Path, texts: Sequence[str], image_size: int, tiny: bool) -> int:
    """Write `base/` in bf16, drawn on the GPU where there is one, and `processor/`; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(texts, 4096)
    text = LlamaConfig(**(TEXT_TINY if tiny else TEXT_7B), vocab_size=32064, max_position_embeddings=4096)
    config = llava_config(text, image_size, SPECIAL.index("<image>"), None if tiny else TOWER_7B)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = write_checkpoint(folder / "base", config, make_processor(tokenizer, image_size), SEED, "bfloat16", device)
    save_stage_processor(folder)
    return parameters


def run(options: argparse.Namespace, folder: Path, drawer: Drawer, step: int, how: dict[str, Any]) -> dict[str, Any]:
    """One run, on another step of the data in every repeat."""
    path, images = drawer.write(options.work, step, options.conversations)
    asked = {"side": "ours", "how": {**how, "feature_cache": False}}
    asked |= {"steps": options.steps, "conversations": options.conversations}
    places = {"folder": str(folder), "file": str(path), "images": str(images)}
    found = how | run_apart(str(RUNS), [json.dumps(asked | places)])
    print(f"{how}: {found['per_second']:.2f} conversations/s, {found['peak_gpu_mb']:,.0f} MB of GPU memory", file=sys.stderr)
    return found


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`: medians, and ranges of speed."""
    rows = []
    for bits, tokens in dict.fromkeys((run["quantization"], run["max_row_tokens"]) for run in result["runs"]):
        chosen = [run for run in result["runs"] if (run["quantization"], run["max_row_tokens"]) == (bits, tokens)]
        packed, padded = ([run for run in chosen if run["layout"] == layout] for layout in LAYOUTS)
        ratio = spread([one["per_second"] / other["per_second"] for one, other in zip(packed, padded, strict=True)])
        speeds = [spread([run["per_second"] for run in runs])["median"] for runs in (packed, padded)]
        peaks = [max(run["peak_gpu_mb"] for run in runs) for runs in (packed, padded)]
        useful = min(run["counts"]["useful"] for run in packed)
        rows.append(
            f"| {bits or 'bf16'} | {tokens:,} | {speeds[0]:.2f} | {speeds[1]:.2f} | **{ratio['median']:.2f}** "
            f"({ratio['least']:.2f} to {ratio['most']:.2f}) | {peaks[0]:,.0f} | {peaks[1]:,.0f} | {useful:.1%} |"
        )
    settings = result["settings"]
    return "\n".join(
        [
            f"## {result['date']} · packing_gpu: packed rows beside padded ones",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: LLaVA of {result['parameters'] / 1e6:,.1f} M parameters, {settings['work']}, LoRA and projector; "
            f"{settings['steps']} steps of {settings['conversations']}; {settings['repeats']} repeats",
            "",
            "| base | tokens of a device batch | packed, conversations/s | padded | times | packed, GPU MB | padded | useful |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()

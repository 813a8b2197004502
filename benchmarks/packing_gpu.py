"""Packed rows on one CUDA GPU, beside padded ones and TRL's trainer, with a LLaVA of LLaVA-1.5-7B's shape.

    python benchmarks/packing_gpu.py --work vqa --data DATA --log    # every arm, five repeats: hours
    python benchmarks/packing_gpu.py --work vqa --data DATA --log --folder F --minutes 9    # resumes
    python benchmarks/packing_gpu.py --tiny --quantization none --row_tokens 2048    # small, no GPU

Weights are random (13.5 GB in bf16, drawn on the GPU). `--folder` keeps them and what was run, so that the
same command, made again, resumes. Each run is a process of its own (`packing_runs.py`): some optimizer steps
of one LoRA stage over the questions of `packing_data.py`, one epoch, activation checkpointing on, four
workers, the first step left out since it compiles. The arms:

- packed: as `curriculum_finetune` has it on CUDA, rows read by FlexAttention. A bound of tokens holds for a
row.
- packed, sdpa: what it falls back to: masks in full where something is shared, rows of their own where
nothing is.
- padded: `layout="padded"`, with the same bound for rows × longest; `sdpa` chooses the kernel.
- TRL: its `SFTTrainer` over the same base, LoRA and data, length-grouped, the answers' loss alone; its best
device batch counts.
  Over 4 bits it casts what trains to bf16, where ours stays fp32.

A ratio is of runs of one repeat, which share their data; all of them must train as many parameters on as many
supervised tokens. What runs out of memory is written down so.

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
from itertools import zip_longest
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

KINDS = ("packed", "TRL", "padded", "packed, sdpa")
WORKERS = 4  # that decode, on either side
SAME_WORK = ("trainable_parameters", "supervised_tokens")
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "ALLOC_FAILED")  # torch's, bitsandbytes', cuBLAS's
TEXT_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TOWER_7B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
TEXT_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}

Found = dict[str, Any] | None  # None: out of memory


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
        how: dict[str, Any] = {"workers": WORKERS, "quantization": None if self.base == "bf16" else self.base}
        if self.kind == "TRL":
            return {"side": "trl", "how": how | {"form": "best", "device_batch": self.size}}
        how |= {"max_row_tokens": self.size, "feature_cache": False, "gradient_checkpointing": True}
        how |= {"padded": {"layout": "padded"}, "packed, sdpa": {"attention": "sdpa"}}.get(self.kind, {})
        return {"side": "ours", "how": how}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", choices=["vqa", "slake", "instruct", "align"], default="vqa", help="what to train on"
    )
    parser.add_argument("--data", type=Path, help="folder of vqa_rad/ and slake/; left out: both are made up")
    parser.add_argument("--arms", nargs="+", choices=KINDS, default=KINDS, help="what to run")
    parser.add_argument(
        "--row_tokens",
        type=int,
        nargs="+",
        default=[8192, 4096, 2048, 16384],
        help="bounds of a device batch",
    )
    parser.add_argument(
        "--device_batches", type=int, nargs="+", default=[8, 4, 16], help="of TRL's, to choose from"
    )
    parser.add_argument(
        "--quantization", nargs="+", choices=["none", "nf4"], default=["none", "nf4"], help="of the base"
    )
    parser.add_argument("--conversations", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, the first left out")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each arm")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--folder", type=Path, help="of the weights and of what was run; left out: temporary")
    parser.add_argument("--tiny", action="store_true", help="a miniature of the model with 16 image tokens")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    # In a process whose GPU memory ends with it
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / ("tiny" if options.tiny else "7b")
        image_size = 56 if options.tiny else 336
        drawer = Drawer(folder, options.data, image_size * 4 // 3, SEED)
        if options.build:
            print(json.dumps(build_base(folder, drawer.texts, image_size, options.tiny)))
            return
        built = folder / "parameters.json"  # written last
        if not built.exists():
            given = ["--data", str(options.data)] if options.data else []
            given += ["--tiny"] if options.tiny else []
            parameters = run_apart(__file__, ["--build", "--folder", str(folder.parent), *given])
            built.write_text(json.dumps(parameters), encoding="utf-8")
        work = Work(options, folder, drawer)
        for repeat, arm in ((repeat, arm) for repeat in range(options.repeats) for arm in arms(options)):
            if options.minutes is None or time.monotonic() - began < options.minutes * 60:
                work.run(repeat, arm)
        parameters = json.loads(built.read_text(encoding="utf-8"))
    done = work.by_arm(arms(options))
    runs = [{**arm._asdict(), "repeats": found} for arm, found in done.items()]
    settings = vars(options) | {"data": None, "folder": None}
    result = {**heading("packing_gpu"), "parameters": parameters, "settings": settings, "runs": runs}
    entry = log_entry(result, done)
    print(entry)
    if options.log:
        write_down(result, entry, options.work)


def build_base(folder: Path, texts: Sequence[str], image_size: int, tiny: bool) -> int:
    """Write `base/` in bf16, drawn on the GPU where there is one, and `processor/`; returns the number of
    parameters."""
    import torch
    from transformers import LlamaConfig

    text = LlamaConfig(**(TEXT_TINY if tiny else TEXT_7B), vocab_size=32064, max_position_embeddings=4096)
    config = llava_config(text, image_size, SPECIAL.index("<image>"), None if tiny else TOWER_7B)
    processor = make_processor(train_tokenizer(texts, 4096), image_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = write_checkpoint(folder / "base", config, processor, SEED, "bfloat16", device)
    save_stage_processor(folder)
    return parameters


def arms(options: argparse.Namespace) -> list[Arm]:
    """Every arm that is asked for, so that what is wanted most is run first: each kind's first size over each
    base."""
    bases = ["bf16" if name == "none" else name for name in options.quantization]
    sizes = [options.device_batches if kind == "TRL" else options.row_tokens for kind in options.arms]
    return [
        Arm(base, kind, size)
        for together in zip_longest(*sizes)
        for base in bases
        for kind, size in zip(options.arms, together, strict=True)
        if size is not None
    ]


class Work:
    """The runs of one work, kept in a file of the folder beside what decides them.

    Args:
        options: the work, its data, conversations and steps.
        folder: of `base/` and `processor/`.
        drawer: of the data.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, drawer: Drawer):
        self.options, self.folder, self.drawer = options, folder, drawer
        self.work = [options.work, options.data is not None, options.conversations, options.steps]
        self.file = folder / "runs.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        kept = [json.loads(line) for line in lines]
        self.done: dict[tuple[int, Arm], Found] = {
            (one["repeat"], Arm(*one["arm"])): one["found"] for one in kept if one["work"] == self.work
        }

    def run(self, repeat: int, arm: Arm) -> None:
        """One run, on other data in every repeat, unless it is there already."""
        if (repeat, arm) in self.done:
            return
        rows = self.options.conversations * self.options.steps
        path, images = self.drawer.write(self.options.work, repeat, rows)
        asked = {
            **arm.asked(),
            "epochs": 1,
            "steps": self.options.steps,
            "conversations": self.options.conversations,
        }
        places = {"folder": str(self.folder), "file": str(path), "images": str(images)}
        found = run_apart(str(RUNS), [json.dumps(asked | places)], allowed=OUT_OF_MEMORY)
        what = "out of memory"
        if found is not None:
            what = f"{found['per_second']:.2f} conversations/s, {found['peak_gpu_mb']:,.0f} MB of GPU memory"
        print(f"repeat {repeat + 1}, {arm.base}, {arm.kind}, {arm.size:,}: {what}", file=sys.stderr)
        self.done[repeat, arm] = found
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"work": self.work, "repeat": repeat, "arm": arm, "found": found}) + "\n")
        self.check_same_work(repeat, arm)

    def check_same_work(self, repeat: int, arm: Arm) -> None:
        """The runs of a repeat train as many parameters on as many supervised tokens."""
        found = self.done[repeat, arm]
        for (other_repeat, other), wanted in self.done.items():
            if found is not None and wanted is not None and other_repeat == repeat:
                for what in SAME_WORK:
                    if found[what] != wanted[what]:
                        sys.exit(
                            f"{arm} and {other} do not do the same work: {what} is {found[what]} and "
                            f"{wanted[what]}."
                        )

    def by_arm(self, wanted: Sequence[Arm]) -> dict[Arm, dict[int, Found]]:
        """Arm → repeat → what was found, of arms that were run."""
        found = {
            arm: {repeat: one for (repeat, ran), one in self.done.items() if ran == arm} for arm in wanted
        }
        return {arm: runs for arm, runs in found.items() if runs}


def log_entry(result: dict[str, Any], done: dict[Arm, dict[int, Found]]) -> str:
    """The result as a section of `LOG.md`: medians, ranges, and ratios to TRL's best device batch of the same
    base."""
    rows = []
    for arm, runs in sorted(done.items()):
        held = {repeat: found for repeat, found in runs.items() if found is not None}
        size = f"{arm.size:,}{' conversations' if arm.kind == 'TRL' else ''}"
        if len(held) < len(runs):
            rows.append(f"| {arm.base} | {arm.kind} | {size} | out of memory | – | – | – |")
            continue
        some = next(iter(held.values()))
        kind = f"{arm.kind} ({some['attention']})" if arm.kind == "packed" else arm.kind
        useful = (
            f"{min(found['counts']['useful'] for found in held.values()):.1%}" if "counts" in some else "–"
        )
        memory = max(found["peak_gpu_mb"] for found in held.values())
        figures = [f"{_median(runs):.2f} ({len(held)})", _times_trl(arm, done), f"{memory:,.0f}", useful]
        rows.append(f"| {' | '.join([arm.base, kind, size, *figures])} |")
    settings = result["settings"]
    return "\n".join(
        [
            f"## {result['date']} · packing_gpu: packed rows beside padded ones and TRL's",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: LLaVA of {result['parameters'] / 1e6:,.1f} M parameters, {settings['work']}, LoRA and "
            f"projector; {settings['steps']} steps of {settings['conversations']}",
            "",
            "| base | arm | tokens of a device batch | conversations/s (runs) | times TRL's best (range) | "
            "GPU MB | useful |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _median(runs: dict[int, Found]) -> float:
    return statistics.median(found["per_second"] for found in runs.values() if found is not None)


def _times_trl(arm: Arm, done: dict[Arm, dict[int, Found]]) -> str:
    """`**8.10** (7.90 to 8.40)`, over the repeats that both ran."""
    trl = [
        other
        for other in done
        if (other.base, other.kind) == (arm.base, "TRL") and None not in done[other].values()
    ]
    if not trl:
        return "–"
    best = done[max(trl, key=lambda other: _median(done[other]))]
    both = done[arm].keys() & best.keys()
    ratios = [done[arm][repeat]["per_second"] / best[repeat]["per_second"] for repeat in both]
    if not ratios:
        return "–"
    ratio = spread(ratios)
    return f"**{ratio['median']:.2f}** ({ratio['least']:.2f} to {ratio['most']:.2f})"


if __name__ == "__main__":
    main()

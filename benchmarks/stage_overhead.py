"""What a stage costs beside TRL's bare `SFTTrainer`: speed of the training loop, and memory of the whole
process.

    python benchmarks/stage_overhead.py                       # five pairs, ten minutes on 2 cores
    python benchmarks/stage_overhead.py --log                 # the same; adds to LOG.md and results/
    python benchmarks/stage_overhead.py --vocabulary 32000    # with LLaVA's number of tokens to choose from

Both sides train the same LoRA and projector of the same LLaVA (about 20 million parameters, 576 image tokens)
on the same conversations in fp32, with the same collation (`PackedCollator`, images decoded while training),
device batch, global batch, rates and number of optimizer steps. Ours is `curriculum_finetune` as a user calls
it. The bare one is `SFTTrainer` with a data collator, gradient accumulation, and its own `compute_loss`. A
step takes every conversation there is, so that both must find the same loss, which is checked. Each run is a
process of its own; pairs follow one another directly, in alternating order.

Speed is conversations per second from the trainer's first step to its last, without loading. Memory is the
process's greatest
resident size, with everything it does: for ours that includes checking the data and writing the stage's
folder. Much of that size is freed memory which glibc keeps for later, and how much differs from run to run.
So a last run of each side, whose speed
does not count, tells glibc to hand back what is freed: its greatest size is what was really held at once.

Numbers are only worth something from a machine that does nothing else: a second busy process on 2 cores made
both sides many times slower, since the threads of a matrix product wait for one another.

One difference is meant: without Triton, TRL scores every position of a row, image tokens included; a stage
scores the supervised ones. The default vocabulary is small so that this hardly counts and what is measured is
the stage's machinery; `--vocabulary 32000` shows it. What is left out: GPUs, several processes, held-out
evaluation, the packed layout.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench import (
    SPECIAL,
    heading,
    llava_config,
    make_processor,
    run_apart,
    spread,
    train_tokenizer,
    write_checkpoint,
    write_down,
)

SIDES = ("ours", "bare")
WANTED = 0.95  # times the bare trainer's speed
RANK, ALPHA, RATE, SEED = 16, 32, 2e-4, 42
SAME_LOSS = 1e-4  # the two sides sum the same losses in another order
# Bytes; glibc would raise them as it goes
HAND_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run")
    parser.add_argument("--conversations", type=int, default=16, help="conversations of a step")
    parser.add_argument("--device_batch", type=int, default=4, help="conversations of a device batch")
    parser.add_argument("--image_size", type=int, default=336, help="pixels; (image_size / 14)² image tokens")
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens of the language model")
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    # One run, in the process that measures it
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.side is not None:
        found = {"ours": run_ours, "bare": run_bare}[options.side](options)
        # Linux counts in KiB
        found["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        parameters = build_base(options)
        build_data(options)
        pairs = [run_pair(options, number) for number in range(options.repeats)]
        held = {side: run_side(options, side, HAND_BACK)["peak_mb"] for side in SIDES}
    result = summarise(options, parameters, pairs, held)
    entry = log_entry(result)
    print(entry)
    if options.log:
        write_down(result, entry, f"vocabulary-{options.vocabulary}")


def build_base(options: argparse.Namespace) -> int:
    """Write a LLaVA checkpoint with random weights; returns its number of parameters."""
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(TEXTS, 512)
    text = LlamaConfig(
        vocab_size=max(options.vocabulary, len(tokenizer)),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=False,
    )
    config = llava_config(text, options.image_size, SPECIAL.index("<image>"))
    return write_checkpoint(
        options.folder / "base", config, make_processor(tokenizer, options.image_size), SEED
    )


TEXTS = [
    f"Is finding {number} visible in the {side} field?" for number in range(10) for side in ("upper", "lower")
]


def build_data(options: argparse.Namespace) -> None:
    """Write as many conversations as a step takes, each about a noise image of its own that is not square."""
    import numpy as np
    from PIL import Image

    noise, words = np.random.default_rng(SEED), random.Random(SEED)
    rows = []
    for row in range(options.conversations):
        pixels = noise.integers(0, 256, (options.image_size, options.image_size * 5 // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(options.folder / f"{row}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{words.choice(TEXTS)}"},
            {"from": "gpt", "value": words.choice(["Yes", "No"])},
        ]
        rows.append({"id": str(row), "image": f"{row}.png", "conversations": turns})
    (options.folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")


def run_pair(options: argparse.Namespace, number: int) -> dict[str, dict[str, Any]]:
    """One run of each side; every second pair begins with the bare one."""
    pair = {side: run_side(options, side) for side in (SIDES if number % 2 == 0 else SIDES[::-1])}
    for what, bound in (("loss_first", SAME_LOSS), ("trainable_parameters", 0), ("conversations", 0)):
        ours, bare = pair["ours"][what], pair["bare"][what]
        if abs(ours - bare) > bound:
            sys.exit(
                f"The sides do not do the same work: {what} is {ours} in ours, {bare} in the bare trainer."
            )
    speeds = ", ".join(f"{side} {pair[side]['conversations_per_second']:.2f}" for side in SIDES)
    print(f"pair {number + 1}/{options.repeats}: {speeds} conversations/s", file=sys.stderr)
    return pair


def run_side(
    options: argparse.Namespace, side: str, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """One run in a process of its own, with some environment variables."""
    settings = ("steps", "conversations", "device_batch", "folder")
    given = [word for name in settings for word in (f"--{name}", str(getattr(options, name)))]
    return run_apart(__file__, ["--side", side, *given], variables)


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    from llavamed_peft import Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune

    schedule = Schedule(
        epochs=options.steps, learning_rate=RATE, global_batch=options.conversations, warmup_ratio=0
    )
    stage = Stage("vqa", "lora", schedule, LoraSpec(RANK, ALPHA, dropout=0.0))
    with tempfile.TemporaryDirectory() as runs:
        adapter = curriculum_finetune(
            options.folder / "base",
            {"vqa": options.folder / "data.json"},
            Path(runs) / "run",
            curriculum=Curriculum((stage,), seed=SEED),
            feature_cache=False,  # the bare trainer looks at every image every time
            layout="padded",
            max_row_tokens=options.device_batch * longest(options),
        )["vqa"]
    kept = (
        "steps",
        "conversations",
        "seconds",
        "conversations_per_second",
        "trainable_parameters",
        "loss_first",
        "loss_last",
    )
    return {name: adapter.metrics[name] for name in kept}


def longest(options: argparse.Namespace) -> int:
    """Tokens of the longest conversation; with all of about that length, this many per row makes even device
    batches."""
    collator, conversations = collation(options)
    return max(int(collator([conversation])["input_ids"].shape[1]) for conversation in conversations)


def collation(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The package's collator, with a stage's processor, and the conversations: all that the bare side takes
    from us."""
    from llavamed_peft.datasets.llava_json import read
    from llavamed_peft.modeling.load import read_config
    from llavamed_peft.modeling.processor import load_processor, make_stage_processor
    from llavamed_peft.packing import PackedCollator

    base = options.folder / "base"
    processor = make_stage_processor(load_processor(base, read_config(base)), "pad")
    return PackedCollator(processor, layout="padded"), list(read(options.folder / "data.json"))


def run_bare(options: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, PrinterCallback, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.monotonic() - self.began

    collator, conversations = collation(options)
    set_seed(SEED)
    model = AutoModelForImageTextToText.from_pretrained(
        options.folder / "base", dtype="auto", attn_implementation="sdpa"
    )
    with tempfile.TemporaryDirectory() as runs:
        config = SFTConfig(
            output_dir=runs,
            num_train_epochs=options.steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            seed=SEED,
            per_device_train_batch_size=options.device_batch,
            gradient_accumulation_steps=-(-options.conversations // options.device_batch),
            max_length=None,
            remove_unused_columns=False,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            data_collator=lambda rows: collator([conversations[row["row"]] for row in rows]),
            train_dataset=Dataset.from_list(
                [{"images": list(one.images), "row": row} for row, one in enumerate(conversations)]
            ),
            processing_class=collator.encoder.processor,
            peft_config=LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules=r"model\.language_model\..*_proj",
                modules_to_save=["multi_modal_projector"],
            ),
        )
        trainer.remove_callback(PrinterCallback)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = options.conversations * trainer.state.global_step
    return {
        "steps": trainer.state.global_step,
        "conversations": seen,
        "seconds": round(clock.seconds, 2),
        "conversations_per_second": round(seen / clock.seconds, 3),
        "trainable_parameters": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def summarise(
    options: argparse.Namespace,
    parameters: int,
    pairs: list[dict[str, dict[str, Any]]],
    held: dict[str, float],
) -> dict[str, Any]:
    """Medians and ranges of both sides, and of the pairs' ratios."""
    speed = {side: [pair[side]["conversations_per_second"] for pair in pairs] for side in SIDES}
    ratios = [ours / bare for ours, bare in zip(*speed.values(), strict=True)]
    named = ("repeats", "steps", "conversations", "device_batch", "image_size", "vocabulary")
    settings = {name: getattr(options, name) for name in named}
    return {
        **heading("stage_overhead"),
        "settings": settings,
        "parameters": parameters,
        "wanted_ratio": WANTED,
        "ratio": spread(ratios),
        "conversations_per_second": {side: spread(values) for side, values in speed.items()},
        "peak_mb": {side: spread([pair[side]["peak_mb"] for pair in pairs]) for side in SIDES},
        "held_mb": held,
        "pairs": pairs,
    }


def log_entry(result: dict[str, Any]) -> str:
    """The result as a section of `LOG.md`."""
    ratio, settings = result["ratio"], result["settings"]
    tokens = (settings["image_size"] // 14) ** 2
    rows = []
    for side, name in (("ours", "a stage of `curriculum_finetune`"), ("bare", "bare `SFTTrainer`")):
        speed, peak = result["conversations_per_second"][side], result["peak_mb"][side]
        rows.append(
            f"| {name} | {speed['median']:.3f} ({speed['least']:.3f} to {speed['most']:.3f}) | "
            f"{peak['median']:,.0f} ({peak['least']:,.0f} to {peak['most']:,.0f}) | "
            f"{result['held_mb'][side]:,.0f} |"
        )
    return "\n".join(
        [
            f"## {result['date']} · stage_overhead: a stage beside the bare trainer",
            "",
            f"- Machine: {result['machine']}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in result['versions'].items())}",
            f"- Command: `{result['command']}`",
            f"- What: LLaVA of {result['parameters'] / 1e6:.1f} M parameters, {tokens} image tokens, "
            f"vocabulary {settings['vocabulary']}, LoRA rank {RANK} and projector, fp32; {settings['steps']} "
            f"steps of {settings['conversations']} conversations, device batch {settings['device_batch']}; "
            f"{settings['repeats']} pairs",
            f"- Expected: at least {WANTED}× the bare trainer's speed",
            f"- Result: **{ratio['median']:.3f}×** (pairs: {ratio['least']:.3f} to {ratio['most']:.3f}), "
            f"{'as expected' if ratio['median'] >= WANTED else 'less than expected'}",
            "",
            "| | conversations/s, median (range) | peak resident MB, median (range) | peak MB held |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()

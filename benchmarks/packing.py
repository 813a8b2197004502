"""Packed training beside TRL's `SFTTrainer` at its best legal settings: speed, memory, and how near both come
to their FLOPs.

    python benchmarks/packing.py --data DATA    # every work, five pairs: two hours on 2 idle cores
    python benchmarks/packing.py --data DATA --work vqa slake --log    # adds to LOG.md and results/

`DATA` holds `vqa_rad/` (MEVF's trainset.json, and images/) and `slake/` (train.json) as released; without it,
both are made up.

Both sides train the same LoRA (every linear of the language model) and projector of the same LLaVA with
random weights on the same conversations (`packing_data.py`) in fp32, in the same global batch, at the same
rate; every run is a process of its own (`packing_runs.py`), pairs follow one another directly, in alternating
order. A run's optimizer steps all take the same conversations; another pair takes others, for vqa and slake
another real step of an epoch. The losses of the first step are
compared: they must agree to 1e-4.

- packed: `curriculum_finetune` as a user calls it, but for `feature_cache=False`. cached: the same with
`feature_cache=True`;
  since steps take the same images, all but the first are a second epoch. padded: with `layout="padded"`: what
  is left of TRL's trainer if only its loss is changed, so padded → packed is what packing alone gives.
- trl: no activation checkpointing; questions as prompt and completion with `completion_only_loss`, dialogues
as messages with
  `assistant_only_loss`; `group_by_length`; images as paths, decoded while training; of the device batches 1
  to 16, and then of no worker and one, the fastest over a quarter of a step. `nll` is its only loss without
  full logits (`dft` computes the same, `chunked_nll` is another name of it, Liger's needs a GPU); on a CPU it
  scores every position of a row all the same, and twice.
- trl defaults: `SFTConfig`'s own settings (so with activation checkpointing), device batch 8, messages, as
its documentation has
  it for images; only bf16 is off, and `max_length`, which would cut images.
- trl dialogue: all questions of an image as one dialogue, at trl's settings. That is another objective: later
questions see
  earlier answers. It says what TRL can do where that is wanted.

Speed is questions (conversations) per wall second of the training loop, warm-up left out: our first step,
TRL's first quarter of a step; TRL's cost is the same in every step. Memory is the process's greatest resident
size (`VmHWM`), with everything it does.
padded and trl dialogue explain and are not judged: the first pair alone has them. Waiting is the share of the
training loop in which our model waits for a step's images, which are decoded in its own process, the default
on a CPU; TRL's does not tell. Useful positions are those that are neither padding nor a beginning which
another row of the step holds, too.

The bound by FLOPs is what TRL's padded step costs over what the packed one costs (the formula is in
`packing_runs.py`); the bound of packing alone takes TRL's with our head. A curve over 1 to 20 questions an
image shows how near we come.

Left out: GPUs (`packing_gpu.py`), several processes, what is learnt (`tests/test_packing.py` compares losses
and gradients).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packing_bench import Bench
from packing_data import Drawer
from packing_report import draw_curve, log_entry, summarise
from packing_runs import SEED
from packing_works import WORKS
from workbench import (
    SPECIAL,
    llava_config,
    make_processor,
    save_stage_processor,
    train_tokenizer,
    write_checkpoint,
    write_down,
)

LEARNT_TOKENS = (
    4096  # of the tokenizer: with fewer than Llama's 32,000 it spells these few texts at about Llama's length
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*(name for name in WORKS if not name.startswith("curve")), "curve"]
    parser.add_argument("--work", nargs="+", choices=choices, default=choices, help="what to train on")
    parser.add_argument("--data", type=Path, help="folder of vqa_rad/ and slake/; left out: both are made up")
    parser.add_argument("--pairs", type=int, default=5, help="repeats")
    parser.add_argument(
        "--conversations",
        type=int,
        help="of an optimizer step, a multiple of 16 or fewer; left out: the work's",
    )
    parser.add_argument(
        "--device_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of TRL's, to choose from"
    )
    parser.add_argument("--image_size", type=int, default=336, help="pixels; (image_size / 14)² image tokens")
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--vocabulary", type=int, default=32064, help="tokens of the language model")
    parser.add_argument(
        "--shared", action="store_true", help="say in the log that the machine did other work too"
    )
    parser.add_argument("--log", action="store_true", help="add the result to LOG.md and results/")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    works = [
        name
        for name in WORKS
        if name in options.work or (name.startswith("curve") and "curve" in options.work)
    ]
    with tempfile.TemporaryDirectory() as folder:
        drawer = Drawer(Path(folder), options.data, options.image_size * 4 // 3, SEED)
        parameters = build_base(Path(folder), drawer.texts, options)
        bench = Bench(Path(folder), drawer, options.conversations, options.device_batches)
        for pair in range(options.pairs):
            for name in works:
                bench.run_pair(name, pair)
        result = summarise(options, works, parameters, bench)
    entry = log_entry(result)
    print(entry)
    if options.log:
        path = write_down(result, entry, "-".join(options.work))
        if result["curve"]:
            draw_curve(result["curve"], path.with_suffix(".png"))


def build_base(folder: Path, texts: Sequence[str], options: argparse.Namespace) -> int:
    """Write `base/`, a LLaVA with random weights, and `processor/`, a stage's; returns the number of
    parameters."""
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(texts, LEARNT_TOKENS)
    text = LlamaConfig(
        vocab_size=max(options.vocabulary, len(tokenizer)),
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config = llava_config(text, options.image_size, SPECIAL.index("<image>"))
    parameters = write_checkpoint(
        folder / "base", config, make_processor(tokenizer, options.image_size), SEED
    )
    save_stage_processor(folder)
    return parameters


if __name__ == "__main__":
    main()

"""Stage 1 of LLaVA-Med alone: the projector learns what figures look like, from figure-caption pairs.

The data are LLaVA JSON, one turn a row: an instruction with `<image>`, the caption as the answer. Left behind
is `<output_dir>/align`, a PEFT adapter that holds the projector; `instruct.py` and `vqa.py` go on from it
with `--start_from`.

python recipes/align.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data pmc_align.json \\
    --image_folder images/ \\
    --output_dir runs/align

Over a 4-bit language model, with the loss on held-out captions and curves in TensorBoard:

python recipes/align.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data pmc_align.json \\
    --eval_data pmc_align_heldout.json \\
    --image_folder images/ \\
    --quantization nf4 \\
    --report_to tensorboard \\
    --output_dir runs/align-nf4

Defaults are the paper's. `python recipes/align.py --help` lists all options; any of them may stand in a YAML
file (`--config`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from llavamed_peft import LLAVA_MED, Curriculum, Schedule, Stage, curriculum_finetune
from llavamed_peft.cli.arguments import RunArguments
from llavamed_peft.cli.launching import is_main_process, start

PAPER = LLAVA_MED["align"].schedule


@dataclass(kw_only=True)
class AlignArguments:
    """What decides the result."""

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: list[str] = field(metadata={"help": "LLaVA JSON, one file or several"})
    output_dir: str = field(
        metadata={"help": "holds the stage's folder, the losses and rejected.jsonl; the same command goes on"}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "where image paths start; None: each data file's folder"}
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "LLaVA JSON to measure the held-out loss on"}
    )
    start_from: str | None = field(
        default=None, metadata={"help": "a finished stage (folder or Hub id) to begin behind"}
    )
    epochs: float = field(
        default=PAPER.epochs, metadata={"help": "passes over the data; a fraction is allowed"}
    )
    learning_rate: float = field(default=PAPER.learning_rate, metadata={"help": "peak rate of the projector"})
    global_batch: int = field(
        default=PAPER.global_batch, metadata={"help": "conversations per optimizer step, all devices"}
    )
    warmup_ratio: float = field(
        default=PAPER.warmup_ratio, metadata={"help": "share of the steps in which the rate rises"}
    )
    weight_decay: float = field(default=PAPER.weight_decay, metadata={"help": "AdamW's"})
    max_length: int = field(
        default=PAPER.max_length, metadata={"help": "tokens; a longer row is rejected. LLaVA-NeXT: 4096"}
    )
    shuffle: Literal["images", "conversations"] = field(
        default=PAPER.shuffle, metadata={"help": "what is drawn"}
    )
    image_aspect_ratio: Literal["pad", "checkpoint"] = field(
        default=LLAVA_MED.image_aspect_ratio,
        metadata={"help": "pad images to a square, or do as the checkpoint's processor does"},
    )
    seed: int = field(default=LLAVA_MED.seed, metadata={"help": "of the order of the data"})


def main(arguments: AlignArguments, run: RunArguments) -> None:
    schedule = Schedule(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        global_batch=arguments.global_batch,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_length=arguments.max_length,
        shuffle=arguments.shuffle,
    )
    curriculum_finetune(
        arguments.model,
        {"align": arguments.data},
        arguments.output_dir,
        image_folder=arguments.image_folder,
        curriculum=Curriculum(
            (Stage("align", "projector", schedule),), arguments.seed, arguments.image_aspect_ratio
        ),
        eval_data={"align": arguments.eval_data} if arguments.eval_data else None,
        start_from=arguments.start_from,
        **asdict(run),
    )
    if is_main_process():
        print(Path(arguments.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, AlignArguments, RunArguments)

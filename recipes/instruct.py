"""Stage 2 of LLaVA-Med alone: projector and language model learn to hold a dialogue about a figure, the
latter as LoRA.

The data are LLaVA JSON, several turns a row. Left behind is `<output_dir>/instruct`, a PEFT adapter that
holds the projector in full and LoRA on every linear of the language model, whatever stage it began behind.

python recipes/instruct.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --start_from runs/align/align \\
    --data instruct_60k.json \\
    --image_folder images/ \\
    --output_dir runs/instruct

Another rank, over a 4-bit language model, with the loss on held-out dialogues:

python recipes/instruct.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --start_from runs/align/align \\
    --data instruct_60k.json \\
    --eval_data instruct_heldout.json \\
    --image_folder images/ \\
    --lora_rank 64 --lora_alpha 128 \\
    --quantization nf4 \\
    --output_dir runs/instruct-r64

Epochs and batch default to the paper's, LoRA and the rates to LLaVA's own LoRA recipe. Full fine-tuning, as
in the paper, is `curriculum.py` with a curriculum of `full` stages. `python recipes/instruct.py --help` lists
all options; any of them may stand in a YAML file (`--config`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from llavamed_peft import LLAVA_MED, Curriculum, LoraSpec, Schedule, Stage, curriculum_finetune
from llavamed_peft.cli.arguments import RunArguments
from llavamed_peft.cli.launching import is_main_process, start

PAPER, LORA = LLAVA_MED["instruct"].schedule, LLAVA_MED["instruct"].lora


@dataclass(kw_only=True)
class InstructArguments:
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
    learning_rate: float = field(default=PAPER.learning_rate, metadata={"help": "peak rate of LoRA"})
    projector_learning_rate: float | None = field(
        default=PAPER.projector_learning_rate,
        metadata={"help": "peak rate of the projector; None: that of LoRA"},
    )
    global_batch: int = field(
        default=PAPER.global_batch, metadata={"help": "conversations per optimizer step, all devices"}
    )
    warmup_ratio: float = field(
        default=PAPER.warmup_ratio, metadata={"help": "share of the steps in which the rates rise"}
    )
    weight_decay: float = field(default=PAPER.weight_decay, metadata={"help": "AdamW's"})
    max_length: int = field(
        default=PAPER.max_length, metadata={"help": "tokens; a longer row is rejected. LLaVA-NeXT: 4096"}
    )
    shuffle: Literal["images", "conversations"] = field(
        default=PAPER.shuffle, metadata={"help": "what is drawn"}
    )
    lora_rank: int = field(default=LORA.rank, metadata={"help": "as in start_from, where that has LoRA"})
    lora_alpha: float = field(default=LORA.alpha, metadata={"help": "the update is scaled by alpha / rank"})
    lora_dropout: float = field(default=LORA.dropout, metadata={"help": "on LoRA's inputs, in training"})
    image_aspect_ratio: Literal["pad", "checkpoint"] = field(
        default=LLAVA_MED.image_aspect_ratio,
        metadata={"help": "pad images to a square, or do as the checkpoint's processor does"},
    )
    seed: int = field(
        default=LLAVA_MED.seed, metadata={"help": "of the order of the data, LoRA's first values and dropout"}
    )


def main(arguments: InstructArguments, run: RunArguments) -> None:
    schedule = Schedule(
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        projector_learning_rate=arguments.projector_learning_rate,
        global_batch=arguments.global_batch,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.weight_decay,
        max_length=arguments.max_length,
        shuffle=arguments.shuffle,
    )
    lora = LoraSpec(arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    curriculum_finetune(
        arguments.model,
        {"instruct": arguments.data},
        arguments.output_dir,
        image_folder=arguments.image_folder,
        curriculum=Curriculum(
            (Stage("instruct", "lora", schedule, lora),), arguments.seed, arguments.image_aspect_ratio
        ),
        eval_data={"instruct": arguments.eval_data} if arguments.eval_data else None,
        start_from=arguments.start_from,
        **asdict(run),
    )
    if is_main_process():
        print(Path(arguments.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, InstructArguments, RunArguments)

"""Stage 2 of LLaVA-Med alone: projector and language model learn to hold a dialogue about a figure, the
latter as LoRA.

The data are LLaVA JSON, several turns a row. It leaves `<output_dir>/instruct`, a PEFT adapter that
holds the projector in full and LoRA on every linear of the language model, whatever stage it continues.

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
all options; any of them may be in a YAML file (`--config`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from llavamed_peft import curriculum_finetune
from llavamed_peft.cli.arguments import RunArguments, StageArguments, StageDataArguments, stage_arguments
from llavamed_peft.cli.launching import is_main_process, start


def main(data: StageDataArguments, stage: StageArguments, run: RunArguments) -> None:
    curriculum_finetune(
        data.model,
        {"instruct": data.data},
        data.output_dir,
        image_folder=data.image_folder,
        curriculum=stage.curriculum(),
        eval_data={"instruct": data.eval_data} if data.eval_data else None,
        start_from=data.start_from,
        **asdict(run),
    )
    if is_main_process():
        print(Path(data.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, StageDataArguments, stage_arguments("instruct"), RunArguments)

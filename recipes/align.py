"""Stage 1 of LLaVA-Med alone: the projector learns what figures look like, from figure-caption pairs.

The data are LLaVA JSON, one turn a row: an instruction with `<image>`, the caption as the answer. It leaves
`<output_dir>/align`, a PEFT adapter that holds the projector; `instruct.py` and `vqa.py` continue it with
`--start_from`.

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

Defaults are the paper's. `python recipes/align.py --help` lists all options; any of them may be in a YAML
file (`--config`).
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
        {"align": data.data},
        data.output_dir,
        image_folder=data.image_folder,
        curriculum=stage.curriculum(),
        eval_data={"align": data.eval_data} if data.eval_data else None,
        start_from=data.start_from,
        **asdict(run),
    )
    if is_main_process():
        print(Path(data.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, StageDataArguments, stage_arguments("align"), RunArguments)

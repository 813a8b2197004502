"""The whole curriculum in one run: align, instruct, vqa, or the stages of a YAML file.

The data are LLaVA JSON, written `stage=file`; a stage with several files is written several times. It leaves
one PEFT adapter a stage, `<output_dir>/<stage>`, each complete on the raw base.

python recipes/curriculum.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data align=pmc_align.json instruct=instruct_60k.json vqa=vqa_rad/train.json \\
    --eval_data vqa=vqa_rad/test.json \\
    --image_folder align=pmc/ instruct=pmc/ vqa=vqa_rad/images/ \\
    --output_dir runs/llava-med

Over a 4-bit language model:

python recipes/curriculum.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data align=pmc_align.json instruct=instruct_60k.json vqa=vqa_rad/train.json \\
    --image_folder images/ \\
    --quantization nf4 \\
    --output_dir runs/llava-med-nf4

Without `--curriculum` the stages are `LLAVA_MED`, the paper's, the later two as LoRA; `LLAVA_MED_FULL` is its
full fine-tuning. Stages of your own are a YAML file; this writes one to begin with, and the command after it
runs it:

python -c "from llavamed_peft import LLAVA_MED_FULL; LLAVA_MED_FULL.to_yaml('stages.yaml')"

python recipes/curriculum.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data align=pmc_align.json instruct=instruct_60k.json vqa=vqa_rad/train.json \\
    --image_folder images/ \\
    --curriculum stages.yaml \\
    --output_dir runs/llava-med-full

In a YAML file of options (`--config`) data, eval_data and image_folder may be mappings of stage to file, and
the stages may be in it: `configs/` has such files for 7B checkpoints. Data sets in formats of their own,
VQA-RAD's above all, are `vqa.py`'s.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from llavamed_peft import curriculum_finetune
from llavamed_peft.cli.arguments import CurriculumArguments, RunArguments
from llavamed_peft.cli.launching import is_main_process, start


def main(arguments: CurriculumArguments, run: RunArguments) -> None:
    curriculum_finetune(
        arguments.model,
        arguments.files("data"),
        arguments.output_dir,
        image_folder=arguments.folders(),
        curriculum=arguments.stages(),
        eval_data=arguments.files("eval_data"),
        start_from=arguments.start_from,
        **asdict(run),
    )
    if is_main_process():
        print(Path(arguments.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, CurriculumArguments, RunArguments)

"""The whole curriculum in one run: align, instruct, vqa, or the stages of a YAML file.

The data are LLaVA JSON, written `stage=file`; a stage with several files is written several times. Left behind is one PEFT
adapter a stage, `<output_dir>/<stage>`, each complete on the raw base.

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

Without `--curriculum` the stages are `LLAVA_MED`: the paper's, the later two as LoRA. Stages of your own are a YAML file; this
writes the paper's full fine-tuning as one to begin with, and the command behind it runs it:

python -c "from llavamed_peft import LLAVA_MED_FULL; LLAVA_MED_FULL.to_yaml('stages.yaml')"

python recipes/curriculum.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --data align=pmc_align.json instruct=instruct_60k.json vqa=vqa_rad/train.json \\
    --image_folder images/ \\
    --curriculum stages.yaml \\
    --output_dir runs/llava-med-full

In a YAML file of options (`--config`) data, eval_data and image_folder may be mappings of stage to file. Data sets in formats of
their own, VQA-RAD's above all, are `vqa.py`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from llavamed_peft import LLAVA_MED, Curriculum, curriculum_finetune
from llavamed_peft.arguments import RunArguments, start
from llavamed_peft.errors import ConfigError

PerStage = list[str]  # "stage=path", or a mapping out of a YAML file


@dataclass(kw_only=True)
class CurriculumArguments:
    """What decides the result."""

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: PerStage = field(metadata={"help": "LLaVA JSON of each stage, stage=file"})
    output_dir: str = field(
        metadata={"help": "holds the stages' folders, the losses and rejected.jsonl; the same command goes on"}
    )
    image_folder: PerStage | None = field(
        default=None, metadata={"help": "where image paths start: one folder, or stage=folder; None: each data file's folder"}
    )
    eval_data: PerStage | None = field(default=None, metadata={"help": "LLaVA JSON to measure held-out losses on, stage=file"})
    curriculum: str | None = field(
        default=None, metadata={"help": "YAML file of the stages, or in --config the stages themselves; None: LLAVA_MED"}
    )
    start_from: str | None = field(default=None, metadata={"help": "a finished stage (folder or Hub id) to begin behind"})


def files_of(option: str, given: PerStage | dict[str, str | list[str]] | None) -> dict[str, list[str]]:
    """`["vqa=a.json", "vqa=b.json"]` or `{"vqa": ["a.json", "b.json"]}` → `{"vqa": ["a.json", "b.json"]}`."""
    if isinstance(given, dict):
        return {stage: [files] if isinstance(files, str) else files for stage, files in given.items()}
    files: dict[str, list[str]] = {}
    for word in [given] if isinstance(given, str) else given or []:
        stage, equals, path = word.partition("=")
        if not (stage and equals and path):
            raise ConfigError(f"{option} is given {word!r}; wanted stage=path, such as align={word}.")
        files.setdefault(stage, []).append(path)
    return files


def folders_of(given: PerStage | dict[str, str] | str | None) -> str | dict[str, str] | None:
    """One folder for all stages, or stage → folder."""
    if given is None or isinstance(given, (str, dict)):
        return given
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    return {stage: folders[-1] for stage, folders in files_of("image_folder", given).items()}


def curriculum_of(given: str | dict[str, object] | None) -> Curriculum:
    """The paper's, that of a file, or that which stands in the file of options."""
    if given is None:
        return LLAVA_MED
    if isinstance(given, str):
        return Curriculum.from_yaml(Path(given))
    return Curriculum.from_yaml(yaml.safe_dump(given))  # as text again: the options' reader takes 2e-3 for a word


def main(arguments: CurriculumArguments, run: RunArguments) -> None:
    curriculum_finetune(
        arguments.model,
        files_of("data", arguments.data),
        arguments.output_dir,
        image_folder=folders_of(arguments.image_folder),
        curriculum=curriculum_of(arguments.curriculum),
        eval_data=files_of("eval_data", arguments.eval_data),
        start_from=arguments.start_from,
        **asdict(run),
    )
    print(Path(arguments.output_dir, "stages.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    start(main, CurriculumArguments, RunArguments)

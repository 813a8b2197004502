"""Stage 3 of LLaVA-Med alone: short answers to questions about radiographs, then the held-out ones asked and
scored.

Of VQA-RAD's own JSON (`--dataset vqa_rad`) one split trains and another is answered. It leaves in
`output_dir`: `vqa/`, the PEFT adapter; `answers.jsonl`, each held-out question with the truth and what the
model said; `scores.md`, exact match beside the majority answer, open and closed questions apart.

The original release, both splits in one file (1,797 questions train, 451 are held out):

python recipes/vqa.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --start_from runs/instruct/instruct \\
    --data vqa_rad/vqa_rad_public.json \\
    --image_folder vqa_rad/images/ \\
    --output_dir runs/vqa-rad

The split of the paper's numbers, a file a split, over a 4-bit language model:

python recipes/vqa.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --start_from runs/instruct/instruct \\
    --data vqa_rad/trainset.json \\
    --eval_data vqa_rad/testset.json \\
    --image_folder vqa_rad/images/ \\
    --quantization nf4 \\
    --output_dir runs/vqa-rad-mevf

Questions as LLaVA JSON train too. They do not say which are open and which closed, so only the held-out loss
is measured. SLAKE's own files are not read; the ones below were made of them:

python recipes/vqa.py \\
    --model llava-hf/llava-1.5-7b-hf \\
    --dataset llava \\
    --data slake/llava_train.json \\
    --eval_data slake/llava_test.json \\
    --image_folder slake/images/ \\
    --output_dir runs/slake

Epochs and batch default to the paper's, LoRA and the rates to LLaVA's own LoRA recipe.
`recipes/configs/tiny-vqa-rad.yaml` is the first command on a tiny checkpoint, as a file of options. `python
recipes/vqa.py --help` lists them all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llavamed_peft import Question, StageAdapter, curriculum_finetune, load_stage
from llavamed_peft.cli.arguments import RunArguments, StageArguments, stage_arguments
from llavamed_peft.cli.launching import is_main_process, start
from llavamed_peft.datasets import vqa_rad
from llavamed_peft.datasets.sources import question_source
from llavamed_peft.evaluation.answer import answer_questions
from llavamed_peft.evaluation.exact_match import majority_answers, score, score_table
from llavamed_peft.storage.images import load_image


@dataclass(kw_only=True)
class VqaArguments:
    """What decides the result."""

    model: str = field(metadata={"help": "Hub id or folder of a LLaVA checkpoint"})
    data: str = field(metadata={"help": "file of the training questions"})
    output_dir: str = field(
        metadata={"help": "holds the stage's folder, answers.jsonl, scores.md; the same command resumes"}
    )
    dataset: Literal["vqa_rad", "llava"] = field(default="vqa_rad", metadata={"help": "format of the files"})
    split: str = field(default="train", metadata={"help": "vqa_rad: what to train on"})
    eval_split: str = field(default="test", metadata={"help": "vqa_rad: what to answer and score"})
    eval_data: str | None = field(
        default=None, metadata={"help": "file of the held-out questions; None, vqa_rad: that of data"}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "where image paths start; None: the data file's folder"}
    )
    start_from: str | None = field(
        default=None, metadata={"help": "a finished stage (folder or Hub id) to continue"}
    )
    max_new_tokens: int = field(
        default=32, metadata={"help": "where an answer is cut that does not end by itself"}
    )
    answer_batch: int = field(default=8, metadata={"help": "questions answered at once"})


def train(arguments: VqaArguments, stage: StageArguments, run: RunArguments) -> StageAdapter:
    """The stage, on questions of the data set."""
    data, eval_data = arguments.data, arguments.eval_data
    if arguments.dataset == "vqa_rad":
        eval_data = question_source(
            vqa_rad.read, eval_data or data, arguments.image_folder, arguments.eval_split
        )
        data = question_source(vqa_rad.read, data, arguments.image_folder, arguments.split)
    adapters = curriculum_finetune(
        arguments.model,
        {"vqa": data},
        arguments.output_dir,
        image_folder=arguments.image_folder,
        curriculum=stage.curriculum(),
        eval_data={"vqa": eval_data} if eval_data else None,
        start_from=arguments.start_from,
        **asdict(run),
    )
    return adapters["vqa"]


def held_out_questions(arguments: VqaArguments) -> list[Question]:
    """All of them, or an error: a test set is not scored in part; better to know before training."""
    path = arguments.eval_data or arguments.data
    questions = list(vqa_rad.read(path, arguments.image_folder, arguments.eval_split))
    for image in sorted({question.image for question in questions}):
        load_image(image)
    return questions


def answer(
    arguments: VqaArguments, run: RunArguments, adapter: StageAdapter, questions: list[Question]
) -> list[str]:
    """What the trained stage says to each question."""
    parent = None if arguments.start_from is None else StageAdapter.load(arguments.start_from)
    base = parent.path if parent is not None and parent.is_checkpoint else arguments.model
    model, processor = load_stage(base, adapter, run.quantization, run.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return answer_questions(model, processor, questions, arguments.max_new_tokens, arguments.answer_batch)


def write_answers(path: Path, questions: list[Question], answers: list[str]) -> None:
    """One JSON object a line, in the order of the questions."""
    with path.open("w", encoding="utf-8") as file:
        for question, text in zip(questions, answers, strict=True):
            row = {
                "question_id": question.id,
                "prompt": question.question,
                "text": text,
                "truth": question.answer,
            }
            file.write(json.dumps({**row, "answer_type": question.answer_type}, ensure_ascii=False) + "\n")


def main(arguments: VqaArguments, stage: StageArguments, run: RunArguments) -> None:
    folder = Path(arguments.output_dir)
    questions = held_out_questions(arguments) if arguments.dataset == "vqa_rad" else []
    adapter = train(arguments, stage, run)
    if not is_main_process():
        return
    print((folder / "stages.md").read_text(encoding="utf-8"))
    if questions:
        answers = answer(arguments, run, adapter, questions)
        write_answers(folder / "answers.jsonl", questions, answers)
        trained_on = vqa_rad.read(arguments.data, arguments.image_folder, arguments.split, rejects=[])
        table = score_table(score(questions, answers, majority_answers(trained_on)))
        (folder / "scores.md").write_text(table, encoding="utf-8")
        print(table)


if __name__ == "__main__":
    start(main, VqaArguments, stage_arguments("vqa", rows="questions"), RunArguments)
